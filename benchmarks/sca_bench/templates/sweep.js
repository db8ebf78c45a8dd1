for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const place = event.target.cellIndex;
    if (place === undefined) return;
    const sign = table.dataset.by === String(place) ? -1 : 1;
    table.dataset.by = sign === 1 ? place : "";
    const read = (row) => row.cells[place].textContent.split(" to ")[0].replaceAll(",", "") || "-1";
    const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : b - a);
    body.append(...[...body.rows].sort((a, b) => sign * order(read(a), read(b))));
  });
}
