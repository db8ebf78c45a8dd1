// Sort a table by the column whose heading is clicked, best first; a second click reverses the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const column = event.target.cellIndex;
    if (column === undefined) return;
    const sign = table.dataset.sortedColumn === String(column) ? -1 : 1;
    table.dataset.sortedColumn = sign === 1 ? column : "";
    const getCellText = (row) => row.cells[column].textContent.split(" to ")[0].replaceAll(",", "") || "-1";
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : b - a);
    body.append(...[...body.rows].sort((a, b) => sign * compare(getCellText(a), getCellText(b))));
  });
}
