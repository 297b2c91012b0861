"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const selects = [...document.querySelectorAll("#filters select")];
  const rows = [...document.querySelectorAll("tr.case")];
  const figures = [...document.querySelectorAll("figure")];
  const rest = [...document.querySelectorAll("#computed tbody tr, #evidence tbody tr, #models tbody tr, p.device[data-device]")];
  const LOSS = 0.995;

  const wanted = () => Object.fromEntries(selects.map((select) => [select.dataset.filter, select.value]));
  // What an element does not say of itself, it has of every kind.
  const fits = (element, name, value) => !value || element.dataset[name] === undefined || element.dataset[name] === "" || element.dataset[name] === value;
  const factor = (row) => Number(row.dataset.vVs_library);
  const ratio = (value) => (value < 9.995 ? value.toFixed(2) : value >= 99.95 ? value.toFixed(0) : value.toFixed(1)) + "×";

  function show() {
    const filter = wanted(), losses = byId("filter-losses").checked, name = byId("filter-name").value.trim().toLowerCase();
    const keys = Object.keys(filter);
    const shown = rows.filter((row) => {
      const lost = ["vVs_library", "vVs_standard"].some((key) => row.dataset[key] && Number(row.dataset[key]) < LOSS);
      const fit = keys.every((key) => fits(row, key, filter[key])) && (!losses || lost || row.dataset.failed) && row.dataset.name.toLowerCase().includes(name);
      row.hidden = !fit;
      return fit;
    });
    for (const figure of figures) {
      const parts = figure.dataset.parts;
      const part = !filter.part || !parts || parts.split(" ").includes(filter.part.replaceAll(" ", "_"));
      figure.hidden = !(part && fits(figure, "kind", filter.kind) && fits(figure, "device", filter.device));
    }
    for (const element of rest) element.hidden = !["kind", "part", "dtype", "device"].every((key) => fits(element, key, filter[key]));
    const factors = shown.map(factor).filter((value) => value > 0);
    const mean = Math.exp(factors.reduce((sum, value) => sum + Math.log(value), 0) / factors.length);
    byId("shown").textContent = shown.length;
    byId("compared").textContent = factors.length;
    byId("mean").textContent = factors.length ? ratio(mean) : "–";
    byId("wins").textContent = factors.filter((value) => value >= LOSS).length;
    byId("worst").textContent = factors.length ? ratio(Math.min(...factors)) : "–";
    byId("failed").textContent = shown.filter((row) => row.dataset.failed).length;
    if (byId("none")) byId("none").hidden = shown.length > 0;
    const kept = keys.filter((key) => filter[key]).map((key) => key + "=" + encodeURIComponent(filter[key]));
    if (losses) kept.push("losses=1");
    if (name) kept.push("name=" + encodeURIComponent(name));
    // A link to a part of the page stays as it is.
    if (!kept.length && byId(decodeURIComponent(location.hash.slice(1)))) return;
    try { history.replaceState(null, "", kept.length ? "#" + kept.join("&") : location.pathname + location.search); } catch (error) { /* a page without an address */ }
  }

  function sort(button) {
    const key = button.dataset.sort, down = button.getAttribute("aria-sort") === "ascending";
    document.querySelectorAll("th button").forEach((other) => other.removeAttribute("aria-sort"));
    button.setAttribute("aria-sort", down ? "descending" : "ascending");
    const text = key === "name" || key === "part";
    const value = (row) => (text ? row.dataset[key] : row.dataset["v" + key[0].toUpperCase() + key.slice(1)]);
    const ordered = [...rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // What has no number comes last, whichever way.
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = text ? x.localeCompare(y) : Number(x) - Number(y);
      return down ? -order : order;
    });
    document.querySelector("#cases tbody").append(...ordered);
  }

  for (const pair of location.hash.slice(1).split("&").filter(Boolean)) {
    const [key, value] = pair.split("=").map(decodeURIComponent);
    const select = selects.find((each) => each.dataset.filter === key);
    if (select && [...select.options].some((option) => option.value === value)) select.value = value;
    if (key === "losses") byId("filter-losses").checked = true;
    if (key === "name") byId("filter-name").value = value;
  }
  selects.forEach((select) => select.addEventListener("change", show));
  byId("filter-losses").addEventListener("change", show);
  byId("filter-name").addEventListener("input", show);
  byId("reset").addEventListener("click", () => {
    selects.forEach((select) => { select.value = ""; });
    byId("filter-losses").checked = false;
    byId("filter-name").value = "";
    show();
  });
  document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => sort(button)));
  show();
})();
