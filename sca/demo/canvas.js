// The picture with its regions, and the tools to point with. Runs in gradio's HTML component: `element`, `props`,
// `trigger` and `watch` are set. User actions are sent as trigger("input", {action, ...}); the canvas shows
// props.value: {size: [width, height], regions: [{path, box, points, caption, score, iou, share, color, masks}], current}.
const NS = "http://www.w3.org/2000/svg";
const find = (name) => element.querySelector(name);
const made = (name, attributes) => {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};
let tool = "inside", drag = null, pinned = null, brush = null, cursor = null;

const state = () => props.value?.size ? props.value : {size: [1, 1], regions: [], current: null};
let startsRegion = false;  // sent with the next prompt: events of their own may be handled out of order

function sendAction(action, payload = {}) {
  trigger("input", {action, new_region: startsRegion, ...payload});
  startsRegion = false;
}

function startRegion() {
  startsRegion = true;
  draw();
}
const svg = () => find("svg");
const paint = () => find("canvas");

function at(event) {  // pixels of the image
  const [width, height] = state().size, frame = svg().getBoundingClientRect();
  const scale = Math.min(frame.width / width, frame.height / height);
  const left = frame.left + (frame.width - width * scale) / 2, top = frame.top + (frame.height - height * scale) / 2;
  const within = (value, limit) => Math.min(Math.max(value, 0), limit - 0.01);
  return [within((event.clientX - left) / scale, width), within((event.clientY - top) / scale, height)];
}

function draw() {
  const {size: [width, height], regions, current} = state();
  const root = svg();
  root.setAttribute("viewBox", `0 0 ${width} ${height}`);
  root.replaceChildren();
  if (props.picture) {
    root.append(made("image", {href: props.picture, width, height, preserveAspectRatio: "none"}));
  }
  find(".empty").hidden = Boolean(props.picture);
  const order = regions.map((region, number) => [region.share, number]).sort((a, b) => b[0] - a[0]);
  for (const [, number] of order) root.append(shape(regions[number], number));
  if (cursor) root.append(made("path", {class: "cursor", d: `M${cursor[0] - 8} ${cursor[1]}h16m-8 -8v16`}));
  const list = find("ol");
  list.replaceChildren(...regions.map((region, number) => item(region, number, number === current && !startsRegion)));
  filter();
  show(pinned !== null && pinned < regions.length ? pinned : null);
  const layer = paint();
  if (layer.width !== width || layer.height !== height) [layer.width, layer.height] = [width, height];
}

function shape(region, number) {
  const group = made("g", {class: "region", "data-region": number, style: `--color: ${region.color}`});
  if (region.path) group.append(made("path", {class: "mask", d: region.path}));
  if (region.box) {
    const [x1, y1, x2, y2] = region.box;
    group.append(made("rect", {class: "box", x: x1, y: y1, width: x2 - x1, height: y2 - y1}));
  }
  const radius = Math.max(...state().size) / 90;
  for (const [x, y, label] of region.points) {
    group.append(made("circle", {class: label ? "point inside" : "point outside", cx: x, cy: y, r: radius}));
  }
  return group;
}

function item(region, number, current) {
  const node = document.createElement("li");
  node.dataset.region = number;
  node.style.setProperty("--color", region.color);
  node.tabIndex = 0;
  if (current) node.setAttribute("aria-current", "true");
  const words = document.createElement("span");
  words.textContent = region.caption;
  const facts = document.createElement("small");
  facts.textContent = [
    region.score === null ? "" : `score ${region.score.toFixed(2)}`,
    region.iou === null ? "" : `IoU ${region.iou.toFixed(2)}`,
  ].filter(Boolean).join(" · ");
  node.append(words, " ", facts);
  if (current && region.masks.length > 1) {
    const choice = document.createElement("div");
    choice.setAttribute("role", "group");
    choice.setAttribute("aria-label", "Masks");
    region.masks.forEach((mask, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.mask = place;
      button.textContent = `mask ${place + 1}: IoU ${mask.iou.toFixed(2)}`;
      button.setAttribute("aria-pressed", String(place === region.chosen));
      choice.append(button);
    });
    node.append(choice);
  }
  return node;
}

function filter() {  // what the sliders and the words let through
  const least = {score: Number(find(".least-score").value), share: Number(find(".least-area").value) / 100};
  const words = find(".words").value.trim().toLowerCase();
  let shown = 0;
  state().regions.forEach((region, number) => {
    const through = (region.score ?? 1) >= least.score && region.share >= least.share
      && region.caption.toLowerCase().includes(words);
    shown += through;
    for (const node of element.querySelectorAll(`[data-region="${number}"]`)) node.classList.toggle("off", !through);
  });
  find(".count").textContent = state().regions.length ? `${shown} of ${state().regions.length} regions` : "";
}

function show(number) {
  for (const node of element.querySelectorAll("[data-region]")) {
    node.classList.toggle("on", number !== null && node.dataset.region === String(number));
  }
  const tip = find(".tip"), region = number === null ? null : state().regions[number];
  tip.hidden = !region;
  if (region) tip.textContent = region.caption;
}

const numberOf = (event) => {
  const node = event.target.closest?.("[data-region]");
  return node ? Number(node.dataset.region) : null;
};

function choose(next) {
  tool = next;
  for (const button of element.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  }
  element.classList.toggle("painting", tool === "paint");
}

function sendPainted() {
  const layer = paint();
  sendAction("mask", {png: layer.toDataURL("image/png")});
  layer.getContext("2d").clearRect(0, 0, layer.width, layer.height);
}

function stroke(from, to) {
  const context = paint().getContext("2d");
  context.lineCap = "round";
  context.lineWidth = Math.max(...state().size) * Number(find(".brush").value) / 100;
  context.strokeStyle = "rgb(255, 140, 0)";
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(to[0] + 0.01, to[1]);
  context.stroke();
}

function point(place, label) {
  if (props.picture) sendAction("point", {x: place[0], y: place[1], label});
}

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".stage") || !props.picture || event.button > 0) return;
  drag = {start: at(event), last: at(event), x: event.clientX, y: event.clientY};
  if (tool === "paint") stroke(drag.last, drag.last);
  if (tool !== "look") event.preventDefault();
  find(".stage").setPointerCapture?.(event.pointerId);
});
element.addEventListener("pointermove", (event) => {
  if (!drag) {
    if (event.target.closest(".stage, ol")) show(numberOf(event) ?? pinned);
    return;
  }
  const here = at(event);
  if (tool === "paint") stroke(drag.last, here);
  if (tool === "box") {
    svg().querySelector(".drawn")?.remove();
    const [x, y] = [Math.min(here[0], drag.start[0]), Math.min(here[1], drag.start[1])];
    const [width, height] = [Math.abs(here[0] - drag.start[0]), Math.abs(here[1] - drag.start[1])];
    svg().append(made("rect", {class: "drawn", x, y, width, height}));
  }
  drag.last = here;
});
element.addEventListener("pointerup", (event) => {
  if (!drag) return;
  const {start} = drag, here = at(event), moved = Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4;
  drag = null;
  svg().querySelector(".drawn")?.remove();
  if (tool === "look") {
    const under = document.elementsFromPoint(event.clientX, event.clientY).find((node) => node.closest?.("g.region"));
    pinned = under ? Number(under.closest("g.region").dataset.region) : null;
    show(pinned);
  } else if (tool === "box" && moved) {
    const box = [Math.min(start[0], here[0]), Math.min(start[1], here[1]),
      Math.max(start[0], here[0]), Math.max(start[1], here[1])];
    sendAction("box", {box});
  } else if (tool === "inside" || tool === "outside") {
    point(start, tool === "inside" ? 1 : 0);
  } else if (tool === "paint") {
    sendPainted();
  }
});
element.addEventListener("pointercancel", () => { drag = null; });
element.addEventListener("pointerleave", () => show(pinned));
element.addEventListener("focusin", (event) => { if (event.target.closest("ol")) show(numberOf(event) ?? pinned); });
element.addEventListener("input", (event) => {
  if (event.target.closest(".filters")) { event.stopPropagation(); filter(); }
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.tool) choose(button.dataset.tool);
  else if (button?.dataset.action === "new") startRegion();
  else if (button?.dataset.action) sendAction(button.dataset.action);
  else if (button?.dataset.mask) sendAction("choose", {region: numberOf(event), mask: Number(button.dataset.mask)});
  else if (event.target.closest("ol")) pick(numberOf(event));
});
element.addEventListener("keydown", (event) => {
  if (event.target.closest(".filters")) return;
  if (event.target.tagName === "LI" && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    pick(numberOf(event));
  } else if (event.target.closest(".stage")) {
    keys(event);
  }
});
function pick(number) {
  if (number === null) return;
  pinned = number;
  sendAction("select", {region: number});
}
function keys(event) {  // a cross that arrows move; Enter is a point inside, Shift + Enter one outside
  const [width, height] = state().size, step = Math.max(width, height) / (event.shiftKey ? 100 : 25);
  const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  if (moves[event.key]) {
    cursor = cursor ?? [width / 2, height / 2];
    const [dx, dy] = moves[event.key];
    cursor = [Math.min(Math.max(cursor[0] + dx * step, 0), width - 1),
      Math.min(Math.max(cursor[1] + dy * step, 0), height - 1)];
    draw();
  } else if (event.key === "Enter" && cursor) {
    point(cursor, event.shiftKey ? 0 : 1);
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
    sendAction("undo");
  } else if (event.key === "Escape") {
    cursor = null;
    draw();
  } else {
    return;
  }
  event.preventDefault();
}
watch(["value", "picture"], draw);
choose(tool);
draw();
