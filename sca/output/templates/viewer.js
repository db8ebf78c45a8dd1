// Sections are filled when they come near the window and emptied when they are far: 10,000 regions stay fast.
const find = (selector, parent = document) => parent.querySelector(selector);
const main = find("main"), controls = find("form");
const images = new Map([...main.children].map((section) => {
  const data = find("script", section);
  data.remove();
  return [section, JSON.parse(data.textContent)];
}));

function makeElement(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

function makeShape(svg, name, attributes) {
  const shape = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
  return shape;
}

function formatCount(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function readFilter() {
  const words = find("#search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  return {words, score: Number(find("#score").value), differ: find("#differ")?.checked ?? false};
}

function passes(region, filter) {
  const caption = region.caption.toLowerCase();
  return (region.score ?? 1) >= filter.score && filter.words.every((word) => caption.includes(word));
}

function selectPlaces(image, filter) {  // places of the regions that pass the filter in either file
  const count = Math.max(image.regions.length, image.other?.length ?? 0);
  return [...Array(count).keys()].filter((place) => {
    const [one, other] = [image.regions[place], image.other?.[place]];
    if (filter.differ && one && other && one.caption === other.caption) return false;
    return (one && passes(one, filter)) || (other && passes(other, filter));
  });
}

function decodeLengths(counts) {  // COCO's compressed run lengths: pixels outside and inside in turn
  const lengths = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, bits;
    do {
      bits = counts.charCodeAt(at++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift;
    lengths.push(value + (lengths.length > 2 ? lengths[lengths.length - 2] : 0));
  }
  return lengths;
}

function decodeColumns(counts, height) {  // of each column of a mask the rows where it begins and ends: [y1, y2, ...]
  const columns = [];
  let at = 0;
  decodeLengths(counts).forEach((length, number) => {
    const end = at + length;
    while (number % 2 && at < end) {
      const start = at - at % height, bottom = Math.min(end, start + height);
      (columns[start / height] ??= []).push(at - start, bottom - start);
      at = bottom;
    }
    at = end;
  });
  return columns;
}

function findTurns(left = [], right = []) {  // rows where two neighboring columns begin or cease to differ
  const turns = [];
  for (const y of [...left, ...right].sort((a, b) => a - b)) {
    if (turns.at(-1) === y) turns.pop();
    else turns.push(y);
  }
  return turns;
}

function traceOutline(columns) {  // path data along the edges of pixels, for the even-odd rule
  const corners = [], rows = new Map(), across = [];
  for (let x = 0; x <= columns.length; x++) {
    for (const y of findTurns(columns[x - 1], columns[x])) {
      if (!rows.has(y)) rows.set(y, []);
      rows.get(y).push(corners.length);
      corners.push([x, y]);
    }
  }
  // Corners along a line are the ends of its edges in pairs.
  for (const row of rows.values()) row.forEach((corner, number) => { across[corner] = row[number ^ 1]; });
  const seen = new Uint8Array(corners.length), path = [];
  for (let first = 0; first < corners.length; first++) {
    if (seen[first]) continue;
    path.push(`M${corners[first]}`);
    for (let corner = first; !seen[corner]; corner = across[corner ^ 1]) {
      seen[corner] = seen[corner ^ 1] = 1;
      path.push(`V${corners[corner ^ 1][1]}H${corners[across[corner ^ 1]][0]}`);
    }
    path.push("z");
  }
  return path.join("");
}

function findCenter(columns) {  // a point well inside of a mask, for its label: in the middle of its tallest columns
  const spans = columns.flatMap((column, x) => column.flatMap((top, number) => (
    number % 2 ? [] : [{x: x + 0.5, y: (top + column[number + 1]) / 2, length: column[number + 1] - top}]
  )));
  const longest = spans.reduce((most, {length}) => Math.max(most, length), 0);
  const tall = spans.filter(({length}) => length > 0.9 * longest);
  return tall[tall.length >> 1];
}

function drawRegion(svg, region, size) {  // its shapes, their area and the place of its label
  const shapes = [];
  let area = 0, center = null;
  const add = (name, kind, attributes) => shapes.push(makeShape(svg, name, {class: kind, ...attributes}));
  const columns = region.mask ? decodeColumns(region.mask, size.height) : [];
  if (columns.length) {
    const d = traceOutline(columns);
    for (const kind of ["casing", "shape"]) add("path", kind, {d});
    area = columns.reduce((sum, column) => column.reduce((rest, y, number) => rest + (number % 2 ? y : -y), sum), 0);
    center = findCenter(columns);
  }
  if (region.box) {
    const [x, y, right, bottom] = region.box, rectangle = {x, y, width: right - x, height: bottom - y};
    if (columns.length) add("rect", region.prompt_box ? "frame prompt" : "frame", rectangle);
    else for (const kind of ["casing", "shape"]) add("rect", kind, rectangle);
    area ||= rectangle.width * rectangle.height;
    center ??= {x, y};
  }
  for (const [x, y, label] of region.points) {
    const r = Math.max(Math.max(size.width, size.height) / 120, 0.5);
    add("circle", label ? "point inside" : "point outside", {cx: x + 0.5, cy: y + 0.5, r});
    center ??= {x, y};
  }
  return {shapes, area, center};
}

function makeText(region, kind) {
  if (!region) return makeElement("span", {className: `${kind} none`, textContent: "—"});
  const text = makeElement("span", {className: kind, textContent: region.caption});
  const facts = [["score", region.score], ["IoU", region.iou]].filter(([, value]) => value !== null);
  const shown = facts.map(([name, value]) => `${name} ${value.toFixed(2)}`).join(" · ");
  text.append(" ", makeElement("small", {textContent: shown}));
  return text;
}

function makeItem(image, place, region) {
  const item = makeElement("li", {tabIndex: 0});
  item.append(makeElement("b", {className: "number", textContent: region.region}));
  item.append(makeText(image.regions[place], "one"));
  if (image.other) item.append(makeText(image.other[place], "other"));
  return item;
}

function connect(content) {  // one region is highlighted: the one pointed at or focused, else the one clicked
  const parts = [...content.querySelectorAll("[data-place]")], list = find("ol", content);
  const findPlace = (event) => event.target.closest("[data-place]")?.dataset.place ?? null;
  let pinned = null;
  const highlight = (place) => {
    for (const part of parts) part.classList.toggle("on", part.dataset.place === place);
    const item = find("li.on", content);
    content.classList.toggle("focused", item !== null);
    find(".current", content).textContent = item ? find("span:not(.none)", item).textContent : "";
    if (item && !list.matches(":hover")) list.scrollTop = item.offsetTop - list.clientHeight / 2;
  };
  const pin = (place) => { pinned = place; highlight(place); };
  for (const name of ["pointerover", "focusin"]) {
    content.addEventListener(name, (event) => highlight(findPlace(event) ?? pinned));
  }
  for (const name of ["pointerleave", "focusout"]) content.addEventListener(name, () => highlight(pinned));
  content.addEventListener("click", (event) => pin(findPlace(event) === pinned ? null : findPlace(event)));
  content.addEventListener("keydown", (event) => {
    if (event.key === " ") event.preventDefault();
    if (["Enter", " ", "Escape"].includes(event.key)) pin(event.key === "Escape" ? null : findPlace(event));
  });
}

function fill(section) {
  if (find(".content", section)) return;
  const image = images.get(section), [width, height] = [section.dataset.width, section.dataset.height].map(Number);
  const content = find("#content").content.cloneNode(true).firstElementChild, svg = find("svg", content);
  const mark = (node, place) => {
    node.dataset.place = place;
    node.classList.add(`c${place % main.dataset.colors}`);
    return node;
  };
  find(".stage", content).style.maxWidth = `calc(76vh * ${width / height})`;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", find("h2", section).textContent);
  const attributes = {width, height, ...(section.dataset.picture ? {href: section.dataset.picture} : {})};
  for (const [name, value] of Object.entries(attributes)) find("image", svg).setAttribute(name, value);
  const groups = [];
  for (const place of selectPlaces(image, readFilter())) {
    const region = image.regions[place] ?? image.other[place], drawn = drawRegion(svg, region, {width, height});
    const group = mark(makeShape(svg, "g", {class: "region overlay"}), place);
    group.append(...drawn.shapes);
    groups.push({group, area: drawn.area});
    find("ol", content).append(mark(makeItem(image, place, region), place));
    if (!drawn.center) continue;
    const label = mark(makeElement("span", {className: "label", textContent: region.region, ariaHidden: true}), place);
    Object.assign(label.style, {left: `${100 * drawn.center.x / width}%`, top: `${100 * drawn.center.y / height}%`});
    find(".labels", content).append(label);
  }
  svg.append(...groups.sort((a, b) => b.area - a.area).map(({group}) => group));  // small regions on top
  connect(content);
  section.append(content);
}

function empty(section) {
  const content = find(".content", section);
  if (!content) return;
  section.style.minHeight = `${section.offsetHeight}px`;
  content.remove();
}

const observer = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) (isIntersecting ? fill : empty)(target);
}, {rootMargin: "600px"});

function update() {
  const filter = readFilter();
  let regionCount = 0, imageCount = 0;
  observer.disconnect();
  for (const [section, image] of images) {
    const count = selectPlaces(image, filter).length, isFiltered = filter.words.length || filter.score || filter.differ;
    regionCount += count;
    imageCount += count > 0;
    section.hidden = count === 0 && isFiltered;
    find(".content", section)?.remove();
    section.style.minHeight = "";
    if (!section.hidden) observer.observe(section);
  }
  find("#count").textContent = `${formatCount(regionCount, "region")} in ${formatCount(imageCount, "image")}`;
}

let waiting = null;
controls.addEventListener("input", (event) => {
  if (event.target.id === "overlay") return;
  clearTimeout(waiting);
  waiting = setTimeout(update, 150);
});
controls.addEventListener("submit", (event) => event.preventDefault());
update();
