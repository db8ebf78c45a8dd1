// Viewer of captioned regions. A section is filled when it comes near the window and emptied when it is far away, so
// that a page of 10,000 regions stays responsive.
//
// Each section contains JSON: {regions: [...], other_regions: [...]}, the second only on pages that compare two files.
// A region is {region_id, caption, score, predicted_iou, box, mask, points, is_box_prompt}: the box is x1, y1, x2, y2,
// the mask COCO's compressed run lengths, and each point x, y, label; in image pixels. A region found by a proposer may
// have a name, and one of a calibrated model has a confidence. Regions of one index are a pair.
const query = (selector, parent = document) => parent.querySelector(selector);
const main = query("main"), controls = query("form");
const imagesBySection = new Map([...main.children].map((section) => {
  const data = query("script", section);
  data.remove();
  return [section, JSON.parse(data.textContent)];
}));

function createElement(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

function createSvgElement(svg, name, attributes) {
  const node = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function formatCount(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

function readFilter() {
  const searchTerms = query("#search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const minScore = Number(query("#min-score").value), onlyDifferent = query("#only-different")?.checked ?? false;
  return {searchTerms, minScore, onlyDifferent};
}

function matchesFilter(region, filter) {
  const caption = `${region.caption} ${region.name ?? ""}`.toLowerCase();
  return (region.score ?? 1) >= filter.minScore && filter.searchTerms.every((term) => caption.includes(term));
}

// Return the indices of the regions that match the filter in either file.
function selectRegionIndices(image, filter) {
  const count = Math.max(image.regions.length, image.other_regions?.length ?? 0);
  return [...Array(count).keys()].filter((index) => {
    const [region, otherRegion] = [image.regions[index], image.other_regions?.[index]];
    if (filter.onlyDifferent && region && otherRegion && region.caption === otherRegion.caption) return false;
    return (region && matchesFilter(region, filter)) || (otherRegion && matchesFilter(otherRegion, filter));
  });
}

// Decode COCO's compressed run lengths; runs of background and foreground pixels alternate.
function decodeRunLengths(counts) {
  const lengths = [];
  for (let offset = 0; offset < counts.length;) {
    let value = 0, shift = 0, bits;
    do {
      bits = counts.charCodeAt(offset++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift;
    lengths.push(value + (lengths.length > 2 ? lengths[lengths.length - 2] : 0));
  }
  return lengths;
}

// Decode a mask to its columns: each is the rows [start, end, start, end, ...] of its foreground runs.
function decodeMaskColumns(counts, height) {
  const columns = [];
  let offset = 0;
  decodeRunLengths(counts).forEach((length, runIndex) => {
    const end = offset + length;
    while (runIndex % 2 && offset < end) {
      const columnStart = offset - offset % height, runEnd = Math.min(end, columnStart + height);
      (columns[columnStart / height] ??= []).push(offset - columnStart, runEnd - columnStart);
      offset = runEnd;
    }
    offset = end;
  });
  return columns;
}

// Return the rows of the outline's corners between two neighboring columns: where a difference starts or ends.
function findCornerRows(leftColumn = [], rightColumn = []) {
  const cornerRows = [];
  for (const y of [...leftColumn, ...rightColumn].sort((a, b) => a - b)) {
    if (cornerRows.at(-1) === y) cornerRows.pop();
    else cornerRows.push(y);
  }
  return cornerRows;
}

// Return SVG path data along the pixel edges of a mask, for the even-odd rule.
function traceOutline(columns) {
  const corners = [], cornersByRow = new Map(), horizontalPartners = [];
  for (let x = 0; x <= columns.length; x++) {
    for (const y of findCornerRows(columns[x - 1], columns[x])) {
      if (!cornersByRow.has(y)) cornersByRow.set(y, []);
      cornersByRow.get(y).push(corners.length);
      corners.push([x, y]);
    }
  }
  // Along a line, corners are the ends of edges in pairs; corners 2n and 2n + 1 are the ends of a vertical edge.
  for (const row of cornersByRow.values()) {
    row.forEach((corner, position) => { horizontalPartners[corner] = row[position ^ 1]; });
  }
  const isVisited = new Uint8Array(corners.length), path = [];
  for (let first = 0; first < corners.length; first++) {
    if (isVisited[first]) continue;
    path.push(`M${corners[first]}`);
    for (let corner = first; !isVisited[corner]; corner = horizontalPartners[corner ^ 1]) {
      isVisited[corner] = isVisited[corner ^ 1] = 1;
      path.push(`V${corners[corner ^ 1][1]}H${corners[horizontalPartners[corner ^ 1]][0]}`);
    }
    path.push("z");
  }
  return path.join("");
}

// Return a point inside a mask for its label: the center of the middle one of its tallest runs.
function findLabelPosition(columns) {
  const runs = columns.flatMap((column, x) => column.flatMap((start, position) => (
    position % 2 ? [] : [{x: x + 0.5, y: (start + column[position + 1]) / 2, length: column[position + 1] - start}]
  )));
  const maxLength = runs.reduce((longest, {length}) => Math.max(longest, length), 0);
  const tallRuns = runs.filter(({length}) => length > 0.9 * maxLength);
  return tallRuns[tallRuns.length >> 1];
}

function computeMaskArea(columns) {
  return columns.reduce((area, column) => (
    column.reduce((columnArea, y, position) => columnArea + (position % 2 ? y : -y), area)
  ), 0);
}

// Return the SVG elements of a region, its area in pixels, and the position of its label; null without a shape.
function drawRegion(svg, region, imageSize) {
  const shapes = [];
  let area = 0, labelPosition = null;
  const addShape = (name, className, attributes) => {
    shapes.push(createSvgElement(svg, name, {class: className, ...attributes}));
  };
  const columns = region.mask ? decodeMaskColumns(region.mask, imageSize.height) : [];
  if (columns.length) {
    const d = traceOutline(columns);
    for (const className of ["halo", "contour"]) addShape("path", className, {d});
    area = computeMaskArea(columns);
    labelPosition = findLabelPosition(columns);
  }
  if (region.box) {
    const [x, y, right, bottom] = region.box, rectangle = {x, y, width: right - x, height: bottom - y};
    if (columns.length) addShape("rect", region.is_box_prompt ? "box prompt" : "box", rectangle);
    else for (const className of ["halo", "contour"]) addShape("rect", className, rectangle);
    area ||= rectangle.width * rectangle.height;
    labelPosition ??= {x, y};
  }
  for (const [x, y, label] of region.points) {
    const r = Math.max(Math.max(imageSize.width, imageSize.height) / 120, 0.5);
    addShape("circle", label ? "point foreground" : "point background", {cx: x + 0.5, cy: y + 0.5, r});
    labelPosition ??= {x, y};
  }
  return {shapes, area, labelPosition};
}

function createCaption(region, className) {
  if (!region) return createElement("span", {className: `${className} missing`, textContent: "—"});
  const caption = createElement("span", {className, textContent: region.caption});
  const scores = [["score", region.score], ["confidence", region.confidence ?? null], ["IoU", region.predicted_iou]]
    .filter(([, value]) => value !== null);
  const scoreTexts = scores.map(([name, value]) => `${name} ${value.toFixed(2)}`);
  const details = [...(region.name ? [region.name] : []), ...scoreTexts].join(" · ");
  caption.append(" ", createElement("small", {textContent: details}));
  return caption;
}

function createListItem(image, index, region) {
  const item = createElement("li", {tabIndex: 0});
  item.append(createElement("b", {className: "region-id", textContent: region.region_id}));
  item.append(createCaption(image.regions[index], "caption"));
  if (image.other_regions) item.append(createCaption(image.other_regions[index], "other-caption"));
  return item;
}

// Highlight one region at a time: the one under the pointer or with the focus, else the one that was clicked.
function addHighlighting(content) {
  const nodes = [...content.querySelectorAll("[data-index]")], list = query("ol", content);
  const getIndex = (event) => event.target.closest("[data-index]")?.dataset.index ?? null;
  let pinnedIndex = null;
  const highlight = (index) => {
    for (const node of nodes) node.classList.toggle("highlighted", node.dataset.index === index);
    const item = query("li.highlighted", content);
    content.classList.toggle("has-highlight", item !== null);
    query(".highlighted-caption", content).textContent = item ? query("span:not(.missing)", item).textContent : "";
    if (item && !list.matches(":hover")) list.scrollTop = item.offsetTop - list.clientHeight / 2;
  };
  const pin = (index) => { pinnedIndex = index; highlight(index); };
  for (const name of ["pointerover", "focusin"]) {
    content.addEventListener(name, (event) => highlight(getIndex(event) ?? pinnedIndex));
  }
  for (const name of ["pointerleave", "focusout"]) content.addEventListener(name, () => highlight(pinnedIndex));
  content.addEventListener("click", (event) => pin(getIndex(event) === pinnedIndex ? null : getIndex(event)));
  content.addEventListener("keydown", (event) => {
    if (event.key === " ") event.preventDefault();
    if (["Enter", " ", "Escape"].includes(event.key)) pin(event.key === "Escape" ? null : getIndex(event));
  });
}

function fillSection(section) {
  if (query(".content", section)) return;
  const image = imagesBySection.get(section);
  const [width, height] = [section.dataset.width, section.dataset.height].map(Number);
  const content = query("#section-content").content.cloneNode(true).firstElementChild, svg = query("svg", content);
  const setIndex = (node, index) => {
    node.dataset.index = index;
    node.classList.add(`color-${index % main.dataset.numColors}`);
    return node;
  };
  query(".image-frame", content).style.maxWidth = `calc(76vh * ${width / height})`;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", query("h2", section).textContent);
  const attributes = {width, height, ...(section.dataset.image ? {href: section.dataset.image} : {})};
  for (const [name, value] of Object.entries(attributes)) query("image", svg).setAttribute(name, value);
  const groups = [];
  for (const index of selectRegionIndices(image, readFilter())) {
    const region = image.regions[index] ?? image.other_regions[index];
    const {shapes, area, labelPosition} = drawRegion(svg, region, {width, height});
    const group = setIndex(createSvgElement(svg, "g", {class: "region overlay"}), index);
    group.append(...shapes);
    groups.push({group, area});
    query("ol", content).append(setIndex(createListItem(image, index, region), index));
    if (!labelPosition) continue;
    const properties = {className: "region-label", textContent: region.region_id, ariaHidden: true};
    const label = setIndex(createElement("span", properties), index);
    const [left, top] = [100 * labelPosition.x / width, 100 * labelPosition.y / height];
    Object.assign(label.style, {left: `${left}%`, top: `${top}%`});
    query(".region-labels", content).append(label);
  }
  svg.append(...groups.sort((a, b) => b.area - a.area).map(({group}) => group));  // small regions on top
  addHighlighting(content);
  section.append(content);
}

function emptySection(section) {
  const content = query(".content", section);
  if (!content) return;
  section.style.minHeight = `${section.offsetHeight}px`;
  content.remove();
}

const observer = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) (isIntersecting ? fillSection : emptySection)(target);
}, {rootMargin: "600px"});

function applyFilter() {
  const filter = readFilter();
  const isFiltered = filter.searchTerms.length || filter.minScore || filter.onlyDifferent;
  let numRegions = 0, numImages = 0;
  observer.disconnect();
  for (const [section, image] of imagesBySection) {
    const count = selectRegionIndices(image, filter).length;
    numRegions += count;
    numImages += count > 0;
    section.hidden = count === 0 && isFiltered;
    query(".content", section)?.remove();
    section.style.minHeight = "";
    if (!section.hidden) observer.observe(section);
  }
  query("#region-count").textContent = `${formatCount(numRegions, "region")} in ${formatCount(numImages, "image")}`;
}

let filterTimer = null;
controls.addEventListener("input", (event) => {
  if (event.target.id === "show-regions") return;
  clearTimeout(filterTimer);
  filterTimer = setTimeout(applyFilter, 150);
});
controls.addEventListener("submit", (event) => event.preventDefault());
applyFilter();
