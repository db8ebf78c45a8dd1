// Canvas of the demo: the image with its regions, and tools for prompts. Runs in gradio's HTML component, which
// defines `element`, `props`, `trigger` and `watch`. User actions are sent as trigger("input", {action, ...}).
// props.image is a data URI. props.value is {size: [width, height], regions: [{path, box, points, caption, score,
// match_score, predicted_iou, confidence, area_fraction, color, masks: [{predicted_iou}], mask_index}], current_index,
// is_out_of_distribution}, in image pixels.
const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
const PAINT_COLOR = "rgb(255, 140, 0)";
const MIN_DRAG_DISTANCE = 4;  // screen pixels; shorter drags are clicks

// drag: {start, last} in image pixels and {x, y} in screen pixels, or null; crosshair: [x, y] in image pixels, or null.
let tool = "foreground", drag = null, pinnedIndex = null, crosshair = null;
// Sent with the next prompt, because events can be handled out of order.
let startsNewRegion = false;

const query = (selector) => element.querySelector(selector);
const getState = () => props.value?.size ? props.value : {size: [1, 1], regions: [], current_index: null};
const getSvg = () => query("svg");
const getPaintCanvas = () => query("canvas");

function createSvgElement(name, attributes) {
  const node = document.createElementNS(SVG_NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function sendAction(action, payload = {}) {
  trigger("input", {action, new_region: startsNewRegion, ...payload});
  startsNewRegion = false;
}

function startNewRegion() {
  startsNewRegion = true;
  render();
}

// Return the position of a pointer event in image pixels.
function getImagePoint(event) {
  const [width, height] = getState().size, frame = getSvg().getBoundingClientRect();
  const scale = Math.min(frame.width / width, frame.height / height);
  const left = frame.left + (frame.width - width * scale) / 2, top = frame.top + (frame.height - height * scale) / 2;
  const clamp = (value, limit) => Math.min(Math.max(value, 0), limit - 0.01);
  return [clamp((event.clientX - left) / scale, width), clamp((event.clientY - top) / scale, height)];
}

function render() {
  const {size: [width, height], regions, current_index: currentIndex} = getState();
  const svg = getSvg();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  if (props.image) {
    svg.append(createSvgElement("image", {href: props.image, width, height, preserveAspectRatio: "none"}));
  }
  query(".placeholder").hidden = Boolean(props.image);
  query(".ood-note").hidden = !getState().is_out_of_distribution;
  // Small regions are drawn last, on top of large ones.
  const order = regions.map((region, index) => [region.area_fraction, index]).sort((a, b) => b[0] - a[0]);
  for (const [, index] of order) svg.append(createRegionGroup(regions[index], index));
  if (crosshair) {
    svg.append(createSvgElement("path", {class: "crosshair", d: `M${crosshair[0] - 8} ${crosshair[1]}h16m-8 -8v16`}));
  }
  query("ol").replaceChildren(...regions.map((region, index) => (
    createListItem(region, index, index === currentIndex && !startsNewRegion)
  )));
  applyFilters();
  highlightRegion(pinnedIndex !== null && pinnedIndex < regions.length ? pinnedIndex : null);
  const canvas = getPaintCanvas();
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
}

function createRegionGroup(region, index) {
  const group = createSvgElement("g", {class: "region", "data-region-index": index, style: `--color: ${region.color}`});
  if (region.path) group.append(createSvgElement("path", {class: "mask", d: region.path}));
  if (region.box) {
    const [x1, y1, x2, y2] = region.box;
    group.append(createSvgElement("rect", {class: "box", x: x1, y: y1, width: x2 - x1, height: y2 - y1}));
  }
  const radius = Math.max(...getState().size) / 90;
  for (const [x, y, label] of region.points) {
    const className = label ? "point foreground" : "point background";
    group.append(createSvgElement("circle", {class: className, cx: x, cy: y, r: radius}));
  }
  return group;
}

function createListItem(region, index, isCurrent) {
  const item = document.createElement("li");
  item.dataset.regionIndex = index;
  item.style.setProperty("--color", region.color);
  item.tabIndex = 0;
  if (isCurrent) item.setAttribute("aria-current", "true");
  const caption = document.createElement("span");
  caption.textContent = region.caption;
  const scores = document.createElement("small");
  scores.textContent = [
    region.match_score === null ? "" : `text score ${region.match_score.toFixed(2)}`,
    region.score === null ? "" : `score ${region.score.toFixed(2)}`,
    region.confidence === null ? "" : `confidence ${region.confidence.toFixed(2)}`,
    region.predicted_iou === null ? "" : `IoU ${region.predicted_iou.toFixed(2)}`,
  ].filter(Boolean).join(" · ");
  item.append(caption, " ", scores);
  if (isCurrent && region.masks.length > 1) item.append(createMaskButtons(region));
  return item;
}

function createMaskButtons(region) {
  const group = document.createElement("div");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "Masks");
  region.masks.forEach((mask, maskIndex) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.maskIndex = maskIndex;
    button.textContent = `Mask ${maskIndex + 1}: IoU ${mask.predicted_iou.toFixed(2)}`;
    button.setAttribute("aria-pressed", String(maskIndex === region.mask_index));
    group.append(button);
  });
  return group;
}

// Hide the regions that do not match the search text or the minimum values.
function applyFilters() {
  const minScore = Number(query(".min-score").value), minAreaFraction = Number(query(".min-area").value) / 100;
  const searchText = query(".search-text").value.trim().toLowerCase();
  let numShown = 0;
  getState().regions.forEach((region, index) => {
    const isShown = (region.score ?? 1) >= minScore && region.area_fraction >= minAreaFraction
      && region.caption.toLowerCase().includes(searchText);
    numShown += isShown;
    for (const node of element.querySelectorAll(`[data-region-index="${index}"]`)) {
      node.classList.toggle("filtered-out", !isShown);
    }
  });
  const numRegions = getState().regions.length;
  query(".region-count").textContent = numRegions ? `${numShown} of ${numRegions} regions` : "";
}

// Highlight a region and show its caption; null removes the highlight.
function highlightRegion(index) {
  for (const node of element.querySelectorAll("[data-region-index]")) {
    node.classList.toggle("highlighted", index !== null && node.dataset.regionIndex === String(index));
  }
  const tooltip = query(".tooltip"), region = index === null ? null : getState().regions[index];
  tooltip.hidden = !region;
  if (region) tooltip.textContent = region.caption;
}

function getRegionIndex(event) {
  const node = event.target.closest?.("[data-region-index]");
  return node ? Number(node.dataset.regionIndex) : null;
}

function selectTool(name) {
  tool = name;
  for (const button of element.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  }
  element.classList.toggle("painting", tool === "paint");
}

function selectRegion(index) {
  if (index === null) return;
  pinnedIndex = index;
  sendAction("select_region", {region_index: index});
}

function sendPoint([x, y], label) {
  if (props.image) sendAction("point", {x, y, label});
}

function sendPaintedMask() {
  const canvas = getPaintCanvas();
  sendAction("mask", {image: canvas.toDataURL("image/png")});
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

function paintLine(start, end) {
  const context = getPaintCanvas().getContext("2d");
  context.lineCap = "round";
  context.lineWidth = Math.max(...getState().size) * Number(query(".brush-size input").value) / 100;
  context.strokeStyle = PAINT_COLOR;
  context.beginPath();
  context.moveTo(...start);
  context.lineTo(end[0] + 0.01, end[1]);
  context.stroke();
}

// Return the box x1, y1, x2, y2 between two corners.
function makeBox(start, end) {
  return [Math.min(start[0], end[0]), Math.min(start[1], end[1]),
    Math.max(start[0], end[0]), Math.max(start[1], end[1])];
}

function drawBoxPreview(start, end) {
  removeBoxPreview();
  const [x1, y1, x2, y2] = makeBox(start, end);
  getSvg().append(createSvgElement("rect", {class: "box-preview", x: x1, y: y1, width: x2 - x1, height: y2 - y1}));
}

function removeBoxPreview() {
  getSvg().querySelector(".box-preview")?.remove();
}

// Pin the region under the pointer.
function pinRegion(event) {
  const node = document.elementsFromPoint(event.clientX, event.clientY).find((each) => each.closest?.("g.region"));
  pinnedIndex = node ? Number(node.closest("g.region").dataset.regionIndex) : null;
  highlightRegion(pinnedIndex);
}

// Arrow keys move a crosshair; Enter adds a foreground point, Shift + Enter a background point.
function handleImageKey(event) {
  const [width, height] = getState().size, step = Math.max(width, height) / (event.shiftKey ? 100 : 25);
  const directions = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  if (directions[event.key]) {
    crosshair = crosshair ?? [width / 2, height / 2];
    const [dx, dy] = directions[event.key];
    crosshair = [Math.min(Math.max(crosshair[0] + dx * step, 0), width - 1),
      Math.min(Math.max(crosshair[1] + dy * step, 0), height - 1)];
    render();
  } else if (event.key === "Enter" && crosshair) {
    sendPoint(crosshair, event.shiftKey ? 0 : 1);
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
    sendAction("undo");
  } else if (event.key === "Escape") {
    crosshair = null;
    render();
  } else {
    return;
  }
  event.preventDefault();
}

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".image-frame") || !props.image || event.button > 0) return;
  drag = {start: getImagePoint(event), last: getImagePoint(event), x: event.clientX, y: event.clientY};
  if (tool === "paint") paintLine(drag.last, drag.last);
  if (tool !== "inspect") event.preventDefault();
  query(".image-frame").setPointerCapture?.(event.pointerId);
});
element.addEventListener("pointermove", (event) => {
  if (!drag) {
    if (event.target.closest(".image-frame, ol")) highlightRegion(getRegionIndex(event) ?? pinnedIndex);
    return;
  }
  const point = getImagePoint(event);
  if (tool === "paint") paintLine(drag.last, point);
  if (tool === "box") drawBoxPreview(drag.start, point);
  drag.last = point;
});
element.addEventListener("pointerup", (event) => {
  if (!drag) return;
  const {start} = drag, end = getImagePoint(event);
  const isDrag = Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > MIN_DRAG_DISTANCE;
  drag = null;
  removeBoxPreview();
  if (tool === "inspect") pinRegion(event);
  else if (tool === "box" && isDrag) sendAction("box", {box: makeBox(start, end)});
  else if (tool === "foreground" || tool === "background") sendPoint(start, tool === "foreground" ? 1 : 0);
  else if (tool === "paint") sendPaintedMask();
});
element.addEventListener("pointercancel", () => { drag = null; });
element.addEventListener("pointerleave", () => highlightRegion(pinnedIndex));
element.addEventListener("focusin", (event) => {
  if (event.target.closest("ol")) highlightRegion(getRegionIndex(event) ?? pinnedIndex);
});
element.addEventListener("input", (event) => {
  if (event.target.closest(".filters")) { event.stopPropagation(); applyFilters(); }
});
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.tool) selectTool(button.dataset.tool);
  else if (button?.dataset.action === "new-region") startNewRegion();
  else if (button?.dataset.action) sendAction(button.dataset.action);
  else if (button?.dataset.maskIndex) {
    sendAction("select_mask", {region_index: getRegionIndex(event), mask_index: Number(button.dataset.maskIndex)});
  } else if (event.target.closest("ol")) selectRegion(getRegionIndex(event));
});
element.addEventListener("keydown", (event) => {
  if (event.target.closest(".filters")) return;
  if (event.target.tagName === "LI" && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    selectRegion(getRegionIndex(event));
  } else if (event.target.closest(".image-frame")) {
    handleImageKey(event);
  }
});
watch(["value", "image"], render);
selectTool(tool);
render();
