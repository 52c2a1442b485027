// A click on a heading sorts the table by it; numbers by their value, runs by name.
for (const table of document.querySelectorAll("table.sorted")) {
  const body = table.tBodies[0];
  table.tHead.querySelectorAll("th").forEach((heading, place) => {
    heading.addEventListener("click", () => {
      const order = heading.getAttribute("aria-sort") === "descending" ? 1 : -1;
      const key = (row) => {
        const cell = row.cells[place];
        if (!("value" in cell.dataset)) return cell.textContent;
        return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
      };
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (typeof x === "string") return order * x.localeCompare(y);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return order * (x - y);
      });
      for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
