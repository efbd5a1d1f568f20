"use strict";
(() => {
  const byId = (id) => document.getElementById(id), body = document.querySelector("#pairs tbody");
  const rows = [...body.rows], heads = [...document.querySelectorAll("th[data-key]")];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  /* ---- sort and filter; more rows are laid out as they are scrolled to ---- */
  const PAGE = 60, names = new Intl.Collator(undefined, { numeric: true });
  let order = rows, limit = PAGE;
  function value(row, key) {
    const text = row.dataset[key], number = parseFloat(text);
    return key === "id" ? text : Number.isNaN(number) ? null : number;
  }
  function sort(head) {
    const down = head.getAttribute("aria-sort") !== "descending", key = head.dataset.key.replace(/-(.)/g, (_, c) => c.toUpperCase());
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const keyed = rows.map((row) => [value(row, key), row]);
    keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * (typeof a === "string" ? names.compare(a, b) : a - b));
    order = keyed.map(([, row]) => row);  // rows without a value stay at the end
    limit = PAGE, filter(), body.append(...order);
  }
  for (const head of heads) head.querySelector("button").onclick = () => sort(head);

  function filter() {
    const words = byId("search").value.toLowerCase(), only = byId("only").value;
    const found = order.filter((row) => texts.get(row).includes(words) && (!only || row.classList.contains(only)));
    const shown = new Set(found.slice(0, limit));
    for (const row of rows) row.hidden = !shown.has(row);
    byId("count").textContent = `${found.length} of ${rows.length} found`;
  }
  byId("search").oninput = filter, byId("only").onchange = filter, filter();
  new IntersectionObserver(([end]) => {
    if (end.isIntersecting && limit < rows.length) limit += PAGE, filter();
  }, { rootMargin: "800px" }).observe(document.querySelector("footer"));

  /* ---- the reviewer's notes ---- */
  const place = `registrations ${location.pathname}`;
  let notes = {};
  try { notes = JSON.parse(localStorage.getItem(place)) || {}; } catch { byId("kept").textContent = "This browser keeps no notes: save them before you leave."; }
  for (const row of rows) {
    const id = row.dataset.id, decision = row.querySelector(".decision"), note = row.querySelector(".note");
    [decision.value, note.value] = notes[id] || ["", ""];
    decision.onchange = note.oninput = () => {
      notes[id] = [decision.value, note.value];
      try { localStorage.setItem(place, JSON.stringify(notes)); } catch { byId("kept").textContent = "This browser keeps no notes: save them before you leave."; }
    };
  }
  function table() {
    const cell = (text) => `"${String(text).replaceAll('"', '""')}"`;
    const lines = rows.map((row) => [row.dataset.id, ["plausible", "doubtful", "failed"].find((word) => row.classList.contains(word)), ...(notes[row.dataset.id] || ["", ""])]);
    return [["id", "verdict", "decision", "note"], ...lines].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
  }
  byId("export").onclick = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff" + table()], { type: "text/csv" })), link.download = "review.csv";
    document.body.dataset.saved = table(), link.click(), URL.revokeObjectURL(link.href);
  };
  byId("sides").onclick = () => {
    const turned = document.body.classList.toggle("neurological");
    byId("sides").setAttribute("aria-pressed", turned);
    byId("convention").textContent = turned ? "Neurological view: the patient's left is on the left." : "Radiological view: the patient's left is on the right.";
  };
  for (const dot of document.querySelectorAll("circle"))
    dot.onclick = () => {
      limit = rows.length, filter();
      rows.find((row) => row.dataset.id === dot.dataset.id)?.scrollIntoView({ block: "center" });
    };
  document.body.dataset.ready = "yes";
})();
