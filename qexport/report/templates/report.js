"use strict";

// The value that a cell sorts by: its number, its text, or null where it is empty.
function key(row, column, numeric) {
  const cell = row.cells[column];
  if (numeric) return "v" in cell.dataset ? Number(cell.dataset.v) : null;
  return cell.textContent.trim().toLowerCase() || null;
}

function sort(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const head = heads[column], numeric = head.classList.contains("n");
  const down = head.getAttribute("aria-sort") === "ascending";
  const names = new Intl.Collator(undefined, { numeric: true });
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, column, numeric), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // empty ones last, up or down
    const order = numeric ? a - b : names.compare(a, b);
    return down ? -order : order;
  });
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => sort(table, column)));
}

// Every word has to be in the row, in any order.
for (const input of document.querySelectorAll("input[data-filters]")) {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
  const counted = input.parentElement.querySelector("output");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      shown += !row.hidden;
    });
    counted.value = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
  });
}

for (const button of document.querySelectorAll("button[data-copies]")) {
  const source = document.getElementById(button.dataset.copies);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source); // the clipboard is closed to this page: one key is left to press
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
