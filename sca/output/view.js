// A page to browse regions: sections are filled when they come near the window, and emptied when they are far.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = DATA.colours, SIDE = 640;
const find = (name) => document.querySelector(name);
const made = (name, text = "", more = {}) => Object.assign(document.createElement(name), {textContent: text}, more);
const list = find("main"), controls = find("form");
const sections = DATA.images.map((image, number) => {
  const node = made("section");
  node.dataset.image = number;
  node.append(made("h2", image.name), made("div", "", {className: "content"}));
  list.append(node);
  return node;
});

function asked() {  // what the controls say
  const words = find("#words").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  return {words, score: Number(find("#score").value), differ: find("#differ")?.checked ?? false};
}

function through(region, by) {
  const caption = region[0].toLowerCase();
  return (region[1] ?? 1) >= by.score && by.words.every((word) => caption.includes(word));
}

function chosen(image, by) {  // places of the regions that are let through, in either file
  const count = Math.max(image.regions.length, image.other?.length ?? 0), places = [];
  for (let place = 0; place < count; place++) {
    const [one, other] = [image.regions[place], image.other?.[place]];
    if (by.differ && one && other && one[0] === other[0]) continue;
    if ((one && through(one, by)) || (other && through(other, by))) places.push(place);
  }
  return places;
}

function runs(counts) {  // COCO's compressed run lengths
  const found = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, bits;
    do {
      bits = counts.charCodeAt(at++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift;
    found.push(value + (found.length > 2 ? found[found.length - 2] : 0));
  }
  return found;
}

function paint(canvas, image, regions, strong) {
  const scale = Math.min(1, SIDE / Math.max(image.width, image.height));
  const [width, height] = [Math.max(1, Math.round(image.width * scale)), Math.max(1, Math.round(image.height * scale))];
  Object.assign(canvas, {width, height});
  const context = canvas.getContext("2d"), layer = context.createImageData(width, height), pixels = layer.data;
  for (const [place, region] of regions) {
    if (!region[4]) continue;
    const [red, green, blue] = COLOURS[place % COLOURS.length], alpha = strong === null ? 90 : place === strong ? 170 : 0;
    let at = 0, inside = false;
    if (alpha) {
      for (const length of runs(region[4])) {
        if (inside) {
          for (let pixel = at; pixel < at + length; pixel++) {
            const x = Math.min(width - 1, Math.floor(Math.floor(pixel / image.height) * scale));
            const y = Math.min(height - 1, Math.floor((pixel % image.height) * scale));
            const here = 4 * (y * width + x);
            pixels[here] = red; pixels[here + 1] = green; pixels[here + 2] = blue; pixels[here + 3] = alpha;
          }
        }
        at += length;
        inside = !inside;
      }
    }
  }
  context.putImageData(layer, 0, 0);
  context.lineWidth = Math.max(0.5, 2 * Math.max(width, height) / SIDE);
  for (const [place, region] of regions) {
    if (!region[3] || (strong !== null && place !== strong)) continue;
    const [x1, y1, x2, y2] = region[3].map((value) => value * scale);
    context.strokeStyle = `rgb(${COLOURS[place % COLOURS.length]})`;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
  }
}

function words(region, name) {
  if (!region) return made("span", "—", {className: "none"});
  const node = made("span", region[0], {className: name});
  const facts = [region[1] === null ? "" : `score ${region[1].toFixed(2)}`];
  facts.push(region[2] === null ? "" : `IoU ${region[2].toFixed(2)}`);
  node.append(" ", made("small", facts.filter(Boolean).join(" · ")));
  return node;
}

function fill(node) {
  if (node.dataset.filled) return;
  node.dataset.filled = "1";
  const image = DATA.images[node.dataset.image], by = asked(), places = chosen(image, by);
  const stage = made("div", "", {className: "stage"});
  const picture = made("img", "", {alt: image.name, src: image.source, draggable: false});
  picture.style.aspectRatio = `${image.width} / ${image.height}`;
  const canvas = made("canvas");
  stage.append(picture, canvas);
  const items = made("ol");
  const shown = places.map((place) => [place, image.regions[place] ?? image.other[place]]);
  for (const place of places) {
    const item = made("li", "", {tabIndex: 0});
    item.style.setProperty("--colour", `rgb(${COLOURS[place % COLOURS.length]})`);
    item.dataset.place = place;
    item.append(words(image.regions[place], "one"));
    if (image.other) item.append(words(image.other[place], "other"));
    items.append(item);
  }
  const over = (event) => event.target.closest?.("li");
  const redraw = (strong) => paint(canvas, image, shown, strong);
  for (const name of ["pointerover", "focusin"]) {
    items.addEventListener(name, (event) => redraw(over(event) ? Number(over(event).dataset.place) : null));
  }
  items.addEventListener("pointerleave", () => redraw(null));
  stage.addEventListener("pointermove", (event) => {
    const frame = stage.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * image.width;
    const y = (event.clientY - frame.top) / frame.height * image.height;
    const under = shown.filter(([, region]) => region[3] && x >= region[3][0] && x < region[3][2]
      && y >= region[3][1] && y < region[3][3]);
    const area = ([, region]) => (region[3][2] - region[3][0]) * (region[3][3] - region[3][1]);
    const best = under.sort((a, b) => area(a) - area(b))[0]?.[0] ?? null;
    for (const item of items.children) item.classList.toggle("on", Number(item.dataset.place) === best);
    redraw(best);
  });
  stage.addEventListener("pointerleave", () => {
    for (const item of items.children) item.classList.remove("on");
    redraw(null);
  });
  node.lastChild.replaceChildren(stage, items);
  redraw(null);
}

function empty(node) {
  if (!node.dataset.filled) return;
  node.style.minHeight = `${node.offsetHeight}px`;
  delete node.dataset.filled;
  node.lastChild.replaceChildren();
}

const watcher = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) (isIntersecting ? fill : empty)(target);
}, {rootMargin: "600px"});

function update() {
  const by = asked();
  let regions = 0, images = 0;
  watcher.disconnect();
  for (const node of sections) {
    const count = chosen(DATA.images[node.dataset.image], by).length;
    regions += count;
    images += count > 0;
    node.hidden = count === 0;
    delete node.dataset.filled;
    node.lastChild.replaceChildren();
    node.style.minHeight = "";
    if (count) watcher.observe(node);
  }
  find("#count").textContent = `${regions.toLocaleString("en")} regions in ${images.toLocaleString("en")} images`;
}

let waiting = null;
controls.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(update, 150);
});
controls.addEventListener("submit", (event) => event.preventDefault());
update();
