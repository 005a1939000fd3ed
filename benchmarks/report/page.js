"use strict";

// Headers become buttons that sort. Cells carry what to sort by; those without a value come last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headers.forEach((header, column) => {
    const numeric = header.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const difference = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
        return descending ? -difference : difference;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}

const form = document.querySelector(".filters");
if (form) {
  const selects = [...form.querySelectorAll("select[data-filter]")];
  const rows = [...document.querySelectorAll("table[data-filtered] > tbody > tr")];
  const output = form.querySelector("output");
  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = selects.some((s) => s.value !== "" && row.dataset[s.dataset.filter] !== s.value);
      shown += !row.hidden;
    }
    const all = shown === rows.length;
    output.value = all ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
  };
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  // The fields are reset after this event.
  form.addEventListener("reset", () => setTimeout(filter));
  form.hidden = false;
  filter();
}
