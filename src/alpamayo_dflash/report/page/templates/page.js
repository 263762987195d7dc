"use strict";
// Makes charts, tables and the list of clips from the page's data. Text enters the page as text alone.
window.page = (() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    Object.assign(made, properties);
    made.append(...children);
    return made;
  }

  function shown(value, column) {
    if (value === null || value === undefined) return "–";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value === "string" || column.kind === "text") return String(value);
    if (column.kind === "share") return `${(100 * value).toFixed(1)} %`;
    const digits = column.kind === "count" ? 0 : column.digits;
    const number = value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    return column.kind === "times" ? `${number} ×` : number;
  }

  // Theme: the reader's own at first, then what the switch says.
  const themeButton = document.getElementById("theme");
  function setTheme(name) {
    root.dataset.theme = name;
    themeButton.setAttribute("aria-pressed", String(name === "dark"));
  }
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(preferred.matches ? "dark" : "light");
  function changeTheme(name) {
    setTheme(name);
    for (const each of document.querySelectorAll(".chart")) if (each.view && !("own" in each.dataset)) again(each);
    window.dispatchEvent(new Event("themechange"));
  }
  themeButton.addEventListener("click", () => changeTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  preferred.addEventListener("change", (event) => changeTheme(event.matches ? "dark" : "light"));

  // Charts. Expressions are interpreted, so that the page needs no right to evaluate text.
  // Their program comes last in the file: the list of clips does not wait for it.
  const ready = new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve, { once: true }));
  async function embed(place, spec) {
    await ready;
    place.spec = spec;
    place.classList.add("chart");
    const options = { actions: false, renderer: "svg", ast: true, mode: "vega-lite", config: data.themes[root.dataset.theme] };
    options.tooltip = { theme: root.dataset.theme };
    const made = await window.vegaEmbed(place, spec, options);
    place.view = made.view;
    made.view.addEventListener("click", (_, item) => follow(item));
    place.finish = made.finalize;
    return made.view;
  }

  function names(spec) {
    return new Set([...Object.keys(spec.datasets ?? {}), ...(spec.data?.name ? [spec.data.name] : [])]);
  }

  // The same chart in the other colours, with the values that it has by now.
  function again(place) {
    const datasets = { ...place.spec.datasets };
    for (const name of names(place.spec)) datasets[name] = place.view.data(name).map((each) => ({ ...each }));
    place.finish();
    return embed(place, { ...place.spec, datasets });
  }

  function objects(figure) {
    return figure.rows.map((row, index) => {
      const made = Object.fromEntries(figure.columns.map((column, place) => [column.key, row[place]]));
      if (figure.links.length) made.link = figure.links[index];
      return made;
    });
  }

  async function draw(place) {
    const figure = data.figures[place.dataset.chart];
    return embed(place, { ...figure.spec, datasets: { rows: objects(figure) } });
  }

  function follow(item) {
    if (item?.datum?.link) window.location.hash = item.datum.link;
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const place of document.querySelectorAll(".chart[data-lazy]")) seen.observe(place);

  // Tables.
  function cell(row, place, column, link) {
    const text = element("bdi", { textContent: shown(row[place], column) });
    const inside = link && place === 0 ? element("a", { href: link }, text) : text;
    const made = element("td", { className: column.kind }, inside);
    made.dataset.value = row[place] ?? "";
    return made;
  }

  function fill(table, figure) {
    const heads = figure.columns.map((column) => element("th", { className: column.kind, scope: "col", textContent: column.label }));
    table.tHead.rows[0].replaceChildren(...heads);
    const lines = figure.rows.map((row, index) =>
      element("tr", {}, ...figure.columns.map((column, place) => cell(row, place, column, figure.links[index]))));
    table.tBodies[0].replaceChildren(...lines);
    sortable(table);
    return lines;
  }

  function emptyTable() {
    return element("table", {}, element("thead", {}, element("tr")), element("tbody"));
  }

  for (const details of document.querySelectorAll("details[data-table]")) {
    details.addEventListener("toggle", () => {
      const figure = data.figures[details.dataset.table];
      const table = emptyTable();
      const box = element("div", { className: "scroll", tabIndex: 0 }, table);
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", `${figure.title}, table`);
      fill(table, figure);
      details.append(box);
    }, { once: true });
  }

  function sortable(table) {
    for (const head of table.tHead.rows[0].cells) {
      const button = element("button", { type: "button" }, ...head.childNodes);
      button.addEventListener("click", () => sortBy(table, head));
      head.replaceChildren(button);
    }
  }

  // Missing values come last either way.
  function sortBy(table, head) {
    const numeric = !head.classList.contains("text");
    const before = head.getAttribute("aria-sort");
    const order = before ? (before === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
    for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const lines = [...table.tBodies[0].rows].map((line) => [line, line.cells[head.cellIndex].dataset.value]);
    lines.sort(([, one], [, other]) => {
      if (one === "" || other === "") return (one === "") - (other === "");
      return sign * (numeric ? Number(one) - Number(other) : one.localeCompare(other));
    });
    table.tBodies[0].append(...lines.map(([line]) => line));
  }

  for (const table of document.querySelectorAll("#overview table[data-sortable]")) {
    if (table.id !== "clip-list") sortable(table);
  }

  // The list of clips.
  const list = document.getElementById("clip-list");
  const form = document.getElementById("clip-filters");
  function clipList() {
    const clips = data.clips;
    const lines = fill(list, clips);
    const keys = clips.columns.map((column) => column.key);
    lines.forEach((line, index) => {
      line.clip = { ...Object.fromEntries(keys.map((key, place) => [key, clips.rows[index][place]])), ...clips.meta[index] };
      line.classList.toggle("bad", line.clip.state !== "equal" && line.clip.state !== "");
    });
    const choices = (name) => [...new Set(lines.map((line) => String(line.clip[name] ?? "")))].filter((each) => each !== "");
    for (const manoeuvre of choices("manoeuvre").sort()) {
      form.elements.manoeuvre.append(element("option", { value: manoeuvre, textContent: manoeuvre }));
    }
    data.runs.forEach((name, index) => form.elements.run.append(element("option", { value: String(index), textContent: name })));
    form.querySelector(".runs").hidden = data.runs.length < 2;
    const filter = () => filterClips(lines);
    form.addEventListener("input", filter);
    form.addEventListener("reset", () => setTimeout(filter));
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();
  }

  function filterClips(lines) {
    const wanted = Object.fromEntries(new FormData(form));
    const words = wanted.text.toLowerCase().split(/\s+/u).filter(Boolean);
    const number = (text) => (text === "" ? null : Number(text));
    const most = number(wanted.acceptance), least = number(wanted.error);
    let count = 0;
    for (const line of lines) {
      const clip = line.clip, text = `${clip.clip} ${clip.coc ?? ""} ${clip.problem ?? ""}`.toLowerCase();
      const fits = words.every((word) => text.includes(word))
        && (wanted.run === "" || String(clip.run) === wanted.run)
        && (wanted.manoeuvre === "" || clip.manoeuvre === wanted.manoeuvre)
        && (wanted.state === "" || clip.state === wanted.state)
        && (most === null || (clip.acceptance !== null && clip.acceptance <= most))
        && (least === null || (clip.error !== null && clip.error >= least));
      line.hidden = !fits;
      count += fits;
    }
    document.getElementById("clip-count").textContent = `${count} of ${lines.length} clips`;
  }

  function shownClips(run) {
    const lines = [...list.tBodies[0].rows].filter((line) => !line.hidden && line.clip.run === run && line.clip.state !== "failed");
    return lines.map((line) => line.clip.clip);
  }
  if (list) clipList();

  return { data, element, embed, shown, shownClips };
})();
