"use strict";
const text = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
const number = (value) => value === "" || value === "-" ? NaN : value === "inf" ? Infinity : parseFloat(value);
document.querySelectorAll("#network thead th").forEach((head, column) => {
  const button = document.createElement("button");
  button.textContent = head.textContent; head.replaceChildren(button);
  let down = false;
  button.addEventListener("click", () => {
    const body = document.querySelector("#network tbody"), rows = [...body.rows];
    const numeric = head.classList.contains("n"); down = numeric && column ? !down : false;
    rows.sort((a, b) => {
      const x = text(a, column), y = text(b, column);
      if (!numeric) return x.localeCompare(y);
      const p = number(x), q = number(y);
      if (isNaN(p) || isNaN(q)) return isNaN(p) - isNaN(q);
      return down ? q - p : p - q;
    });
    body.append(...rows);
  });
});
const graph = document.getElementById("graph"), nodes = [...graph.querySelectorAll("g.node")];
document.querySelectorAll("[data-search]").forEach((input) => input.addEventListener("input", () => {
  const wanted = input.value.toLowerCase();
  for (const row of document.getElementById(input.dataset.search).tBodies[0].rows)
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
  const found = nodes.filter((node) => node.dataset.text.toLowerCase().includes(wanted));
  for (const node of nodes) node.classList.toggle("dim", !found.includes(node));
  if (wanted && found.length) found[0].scrollIntoView({ block: "nearest", inline: "nearest" });
}));
const own = graph.viewBox.baseVal.width;
document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
  const by = parseFloat(button.dataset.zoom), box = graph.parentElement, now = graph.getBoundingClientRect().width;
  const whole = Math.min(box.clientWidth, own * box.clientHeight / graph.viewBox.baseVal.height);
  graph.style.maxWidth = "none";
  graph.style.width = Math.max(40, Math.min(by ? now * by : whole, own * 4)) + "px";
}));
nodes.forEach((node) => node.addEventListener("click", () => {
  const row = document.getElementById("row-" + node.dataset.row);
  document.querySelectorAll("tr.shown").forEach((other) => other.classList.remove("shown"));
  row.hidden = false; row.classList.add("shown"); row.scrollIntoView({ block: "center" });
}));
