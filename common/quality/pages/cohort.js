"use strict";
(() => {
  const byId = (id) => document.getElementById(id), body = document.querySelector("#pairs tbody");
  const rows = [...body.rows], heads = [...document.querySelectorAll("th[data-key]")];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  /* ---- sort and filter; only rows that are shown are in the page, more of them as it is scrolled ---- */
  const PAGE = 30;
  let order = rows, found = rows, limit = PAGE;
  function sort(head) {
    const down = head.getAttribute("aria-sort") !== "descending", key = head.dataset.key === "id" ? "order" : head.dataset.key;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1, keyed = rows.map((row) => [parseFloat(row.dataset[key]), row]);
    keyed.sort(([a], [b]) => Number.isNaN(a) - Number.isNaN(b) || sign * (a - b));
    order = keyed.map(([, row]) => row);  // rows without a value stay at the end
    limit = PAGE, filter();
  }
  for (const head of heads) head.querySelector("button").onclick = () => sort(head);

  function filter() {
    const words = byId("search").value.toLowerCase(), only = byId("only").value;
    found = order.filter((row) => texts.get(row).includes(words) && (!only || row.classList.contains(only)));
    body.replaceChildren(...found.slice(0, limit));
    byId("count").textContent = `${found.length} of ${rows.length} found`;
  }
  function more(count) {
    body.append(...found.slice(limit, count)), limit = Math.max(limit, count);
  }
  byId("search").oninput = byId("only").onchange = () => { limit = PAGE, filter(); };
  filter(), document.documentElement.classList.remove("scripted");
  new IntersectionObserver(([end]) => {
    if (end.isIntersecting && limit < found.length) more(limit + PAGE);
  }, { rootMargin: "800px" }).observe(document.querySelector("footer"));
  addEventListener("beforeprint", () => more(found.length));

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
      const here = (row) => row.dataset.id === dot.dataset.id;
      if (!found.some(here)) byId("search").value = byId("only").value = "", filter();
      more(found.findIndex(here) + 1), found.find(here).scrollIntoView({ block: "center" });
    };
  document.body.dataset.ready = "yes";
})();
