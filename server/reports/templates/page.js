"use strict";
// Columns that are sorted by a click. Without this script the tables are as they were written.
const PLAIN_NUMBER = /^-?[\d,]*\.?\d+ ?%?$/;

function keyOf(row, column) {
  const cell = row.cells[column];
  const text = cell.textContent.trim();
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  if (PLAIN_NUMBER.test(text)) return parseFloat(text.replaceAll(",", ""));
  return text === "–" ? "" : text;
}

function compare(one, other, direction) {
  if (one === "" || other === "") return (one === "") - (other === "");  // what is not known stays last
  if (typeof one === "number" && typeof other === "number") return direction * (one - other);
  return direction * String(one).localeCompare(String(other), "en", { numeric: true });
}

function sortBy(table, head, column) {
  const isAscending = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const direction = isAscending ? 1 : -1;
  const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
  rows.sort(([one], [other]) => compare(one, other, direction));
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sortBy(table, head, column));
    head.replaceChildren(button);
  });
}
