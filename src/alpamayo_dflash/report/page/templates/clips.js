"use strict";
// The view of a clip: what the hash names is shown. All that is computed comes from the page's data.
(() => {
  const view = document.getElementById("clip-view");
  if (!view) return;
  const { element, embed } = window.page;
  const overview = document.getElementById("overview");
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const index = read("clips-index"), charts = read("clips-charts"), letters = read("clips-letters");
  const part = (name) => view.querySelector(`[data-part="${name}"]`);
  const chart = (name) => view.querySelector(`[data-chart="clip-${name}"]`);
  const frameDialog = document.getElementById("clip-frame"), keysDialog = document.getElementById("clip-keys");
  const percent = (share, digits = 1) => {
    if (share === undefined) return "–";
    if (share === 0) return "0 %";
    const least = 10 ** -digits;
    return 100 * share < least / 2 ? `< ${least} %` : `${(100 * share).toFixed(digits)} %`;
  };
  const rank = (count) => (count === undefined ? "–" : String(count + 1));
  const letter = (source) => letters[source] ?? "O";
  const colour = (name) => getComputedStyle(view).getPropertyValue(name).trim();
  const clamp = (number, count) => Math.max(0, Math.min(number, count - 1));
  const signs = { accepted: "+", rejected: "−", own: "=", anchor: "" };

  let state = null; // run, clip, sample, round: numbers but for the clip's id
  let clip = null; // its view
  let pictures = {};
  let list = { hash: "", scroll: 0 }; // where the reader came from

  // The hash.
  function asked() {
    const words = new URLSearchParams(window.location.hash.slice(1));
    if (!words.has("clip")) return null;
    const number = (name) => Math.max(0, Number.parseInt(words.get(name) ?? "0", 10) || 0);
    return { run: number("run"), clip: words.get("clip"), sample: number("sample"), round: number("round") };
  }

  function hashOf({ run, clip: id, sample, round }) {
    return `#run=${run}&clip=${encodeURIComponent(id)}&sample=${sample}&round=${round}`;
  }

  function follow() {
    const wanted = asked();
    if (wanted === null) return close();
    const same = clip !== null && state.run === wanted.run && state.clip === wanted.clip;
    if (view.hidden) list = { hash: list.hash, scroll: window.scrollY };
    overview.hidden = true;
    view.hidden = false;
    if (!same) load(wanted);
    state = wanted;
    state.sample = clamp(state.sample, clip.samples.length);
    state.round = clamp(state.round, rounds().length);
    if (same) showSample();
    else showClip();
  }

  function close() {
    list.hash = window.location.hash;
    if (view.hidden) return;
    view.hidden = true;
    overview.hidden = false;
    for (const dialog of [frameDialog, keysDialog]) if (dialog.open) dialog.close();
    window.scrollTo(0, list.scroll);
    const links = [...overview.querySelectorAll("a[href]")];
    links.find((link) => link.getAttribute("href") === `#run=${state.run}&clip=${encodeURIComponent(state.clip)}`)?.focus({ preventScroll: list.scroll > 0 });
    state = null;
    clip = null;
  }

  function go(change, replace = false) {
    const hash = hashOf({ ...state, ...change });
    if (replace) window.history.replaceState(null, "", hash);
    else window.history.pushState(null, "", hash);
    follow();
  }

  // A clip.
  const entryOf = (run, id) => index[run]?.clips.find((each) => each.clip === id);

  function load({ run, clip: id }) {
    const entry = entryOf(run, id);
    pictures = {};
    if (entry === undefined) {
      const note = index[run] === undefined ? `This page has no run ${run}.` : "The run has no such clip.";
      clip = { name: "No such clip", notes: [note], facts: [], samples: [], bars: [], frames: [], paths: [] };
      return;
    }
    clip = read(`clip-${entry.view}`);
    if (entry.pictures !== null) pictures = read(`clip-pictures-${entry.pictures}`);
  }

  const sample = () => clip.samples[state.sample] ?? { coc: "" };
  const rounds = () => (clip.samples[state.sample] ?? {}).rounds ?? [];
  const round = () => rounds()[state.round];

  function order() {
    const all = (index[state.run]?.clips ?? []).map((each) => each.clip);
    const shown = (window.page.shownClips?.(state.run) ?? []).filter((id) => all.includes(id));
    return shown.includes(state.clip) ? shown : all;
  }

  function step(by) {
    const ids = order(), place = ids.indexOf(state.clip) + by;
    if (place >= 0 && place < ids.length) go({ clip: ids[place], sample: 0, round: 0 });
  }

  function showClip() {
    const ids = order();
    part("name").textContent = clip.name;
    part("place").textContent = ids.includes(state.clip) ? `${ids.indexOf(state.clip) + 1} of ${ids.length} clips` : "";
    part("notes").replaceChildren(...clip.notes.map((text) => element("li", {}, element("bdi", { textContent: text }))));
    showElsewhere();
    part("samples").replaceChildren(...(clip.samples.length < 2 ? [] : clip.samples.map((_, number) => {
      const button = element("button", { type: "button", textContent: `sample ${number}` });
      button.addEventListener("click", () => go({ sample: number, round: 0 }, true));
      return button;
    })));
    part("facts").replaceChildren(...clip.facts.map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row", className: "text", textContent: name }), element("td", { textContent: value }))));
    showFrames();
    part("paths-section").hidden = clip.paths.length === 0;
    part("timing-note").textContent = clip.temperature === undefined
      ? "The parts of the evaluation’s own run."
      : "Prompt and trajectory are of the evaluation’s own run; the parts of rounds are of a decode of its own with a clock around each.";
    document.getElementById("clip-title").focus({ preventScroll: true });
    window.scrollTo(0, 0);
    showSample();
  }

  function showElsewhere() {
    const others = index.map((run, number) => [run, number]).filter(([run, number]) =>
      number !== state.run && run.clips.some((each) => each.clip === state.clip));
    const links = others.flatMap(([run, number]) => [" ", element("a", { href: hashOf({ ...state, run: number }) }, element("bdi", { textContent: run.name }))]);
    const here = index.length > 1 && index[state.run] ? ["Run ", element("bdi", { textContent: index[state.run].name }), ". "] : [];
    part("elsewhere").replaceChildren(...here, ...(links.length ? ["The same clip in", ...links] : []));
  }

  // A text.
  function showSample() {
    const { coc, first } = sample();
    [...part("samples").children].forEach((button, number) => button.setAttribute("aria-pressed", String(number === state.sample)));
    part("coc").textContent = coc;
    const traced = first !== undefined;
    for (const name of ["tokens", "legend", "token", "rounds-section"]) part(name).hidden = !traced;
    if (traced) {
      const told = [[first, null, -1], ...rounds().flatMap((each, number) => each.emitted.map((node) => [each.nodes[node], each, number]))];
      part("tokens").replaceChildren(...told.map(([node, each, number]) => tokenButton(node, each, number)));
      countSources(told.map(([node]) => letter(node.source)));
      part("rounds").replaceChildren(...rounds().map(roundLine));
      showRound();
    }
    drawTiming();
    drawPaths();
  }

  function tokenButton(node, each, number) {
    const mark = letter(node.source);
    const button = element("button", { type: "button", className: "token" }, element("bdi", { textContent: node.piece }), element("b", { textContent: mark }));
    button.dataset.look = mark;
    button.dataset.round = String(number);
    const show = () => showToken(node, each, number, button);
    button.addEventListener("mouseenter", show);
    button.addEventListener("focus", show);
    button.addEventListener("click", () => { if (number >= 0) go({ round: number }, true); });
    return button;
  }

  function countSources(marks) {
    for (const item of part("legend").children) {
      const count = marks.filter((mark) => mark === item.dataset.look).length;
      item.hidden = item.dataset.look === "O" && count === 0;
      item.querySelector(".count").textContent = count ? `${count} of ${marks.length}` : "0";
    }
  }

  function blanks(piece) {
    return piece.replaceAll(" ", "␣");
  }

  function roundLine(each, number) {
    const words = [element("span", { className: "note", textContent: `pass ${each.index} sample ${state.sample} ` }),
      element("bdi", { textContent: blanks(each.nodes[0].piece) }), element("span", { className: "note", textContent: " |" })];
    const taken = each.emitted.filter((node) => each.nodes[node].state === "accepted");
    const rest = each.nodes.map((_, node) => node).filter((node) => each.nodes[node].state === "rejected");
    const own = each.emitted.filter((node) => each.nodes[node].state === "own");
    for (const number_ of [...taken, ...rest, ...own]) {
      const node = each.nodes[number_];
      const word = element("span", { className: node.state }, signs[node.state], element("bdi", { textContent: blanks(node.piece) }));
      word.addEventListener("mouseenter", () => showToken(node, each, number, null));
      words.push(" ", word);
    }
    const button = element("button", { type: "button" }, ...words);
    button.addEventListener("click", () => go({ round: number }, true));
    return element("li", {}, button);
  }

  // A round.
  function showRound() {
    const buttons = [...part("rounds").querySelectorAll("button")];
    buttons.forEach((button, number) => {
      if (number === state.round) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
    if (buttons[state.round]) part("rounds").scrollTop = buttons[state.round].offsetTop - part("rounds").clientHeight / 2;
    const count = rounds().length;
    part("round-place").textContent = count ? `round ${state.round + 1} of ${count}` : "no round: the prompt’s pass ended the text";
    for (const token of part("tokens").children) token.classList.toggle("in-round", token.dataset.round === String(state.round));
    const token = part("tokens").querySelector(".in-round") ?? part("tokens").firstElementChild;
    const each = round();
    if (each) showToken(each.nodes[each.emitted[0] ?? 0], each, state.round, token);
    else showToken(sample().first, null, -1, token);
    drawTree();
  }

  function showToken(node, each, number, button) {
    for (const token of part("tokens").children) token.classList.toggle("is-shown", token === button);
    const mark = letter(node.source);
    const where = each === null ? "the prompt’s own pass" : `round ${number + 1}, ${node.x} after the anchor`;
    const source = element("span", { className: "mark", textContent: node.source });
    const about = element("p", {}, source, ` (${mark}), ${node.state === "own" ? "the target’s own" : node.state}; ${where}.`);
    const drawn = clip.temperature ? `temperature ${clip.temperature}, nucleus ${clip.top_p}` : "greedy: at temperature 1";
    const likely = node.p === undefined ? "The target’s probability of it is not among those kept."
      : `The target gave it ${percent(node.p)} in what the decode draws from (${drawn}), ${percent(node.p1)} at temperature 1; rank ${rank(node.rank)}.`;
    const drafted = node.draft_place === undefined ? "The draft was not asked for this place."
      : node.draft_rank === undefined ? "It is not among the draft’s likeliest."
        : `In the draft: rank ${rank(node.draft_rank)}, ${percent(node.q)}.`;
    const target = each === null ? sample().first_target : each.target[node.place];
    const draft = each === null ? undefined : each.draft[node.draft_place];
    const piece = element("p", { className: "piece" }, element("bdi", { textContent: blanks(node.piece) }));
    const tables = element("div", { className: "alternatives" }, ...alternatives("Target’s likeliest", target, node.rank), ...alternatives("Draft’s likeliest", draft, node.draft_rank));
    about.dataset.look = mark;
    const lines = node.state === "anchor" ? ["The last known token before the round."] : [likely, drafted];
    part("token").replaceChildren(piece, about, ...lines.map((text) => element("p", { textContent: text })), tables);
  }

  function alternatives(title, places, place) {
    if (places === undefined) return [];
    const heads = ["token", "drawn", "at T 1"].map((text, column) => element("th", { scope: "col", textContent: text, className: column ? "" : "text" }));
    const lines = places.map(([piece, p, p1], number) => {
      const word = element("td", { className: "text piece-cell" }, number === place ? "▸\u00a0" : "", element("bdi", { textContent: blanks(piece) }));
      return element("tr", { className: number === place ? "is-it" : "" }, word, element("td", { textContent: percent(p) }), element("td", { textContent: percent(p1) }));
    });
    return [element("table", {}, element("caption", { textContent: title }), element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines))];
  }

  // Graphics: specifications from the page, values from here.
  async function draw(name, datasets, { signals = {}, width, height, label }) {
    const place = chart(name);
    const theme = document.documentElement.dataset.theme;
    place.wanted = (place.wanted ?? 0) + 1;
    const mine = place.wanted;
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", label);
    await place.drawing;
    if (mine !== place.wanted) return;
    place.drawing = (async () => {
      if (!place.view || place.theme !== theme) {
        place.finish?.();
        await embed(place, { ...charts[name], datasets, width: 10, ...(height ? { height: 10 } : {}) });
        place.theme = theme;
        if (name === "tree") place.view.addEventListener("mouseover", pointed);
        if (name === "tree") place.view.addEventListener("click", pointed);
      }
      for (const [data, values] of Object.entries(datasets)) place.view.data(data, values);
      for (const [signal, value] of Object.entries(signals)) place.view.signal(signal, value);
      place.view.width(width);
      if (height) place.view.height(height);
      await place.view.runAsync();
      place.done = mine;
    })();
    await place.drawing;
  }

  function pointed(_, item) {
    const node = item?.datum?.node;
    if (node !== undefined && round()?.nodes[node]) showToken(round().nodes[node], round(), state.round, null);
  }

  function drawTree() {
    const each = round();
    view.querySelector(".tree").hidden = !each;
    if (!each) return fillTable("tree");
    const ink = colour("--ink");
    const looks = Object.fromEntries([...part("legend").children].map((item) => [item.dataset.look, getComputedStyle(item).getPropertyValue("--look").trim()]));
    const nodes = each.nodes.map((node, number) => ({
      node: number, x: node.x, y: node.y, piece: blanks(node.piece), state: node.state, ink, colour: looks[letter(node.source)],
      p: node.state === "anchor" ? "anchor" : percent(node.p, 0), rank: node.draft_rank === undefined ? "" : `rank ${rank(node.draft_rank)}`,
    }));
    const edges = each.nodes.slice(1).map((node) => ({
      x: each.nodes[node.parent].x, y: each.nodes[node.parent].y, x2: node.x, y2: node.y, taken: node.state !== "rejected", colour: looks[letter(node.source)],
    }));
    const depth = Math.max(...each.nodes.map((node) => node.x)), lane = Math.max(...each.nodes.map((node) => node.y));
    const { step: [least, most], lane: high } = charts.sizes;
    const step = Math.max(least, Math.min(most, view.querySelector(".tree").clientWidth / (depth + 1) - 2));
    const taken = each.nodes.filter((node) => node.state === "accepted").length;
    const offered = each.nodes.filter((node) => node.state === "accepted" || node.state === "rejected").length;
    const label = `Round ${state.round + 1}: ${taken} of ${offered} proposed tokens accepted, ${each.emitted.length} emitted`;
    draw("tree", { nodes, edges }, { signals: { depth, lane, step }, width: step * (depth + 1), height: high * (lane + 1), label });
    fillTable("tree");
  }

  const roomFor = (name, most) => Math.min(most, Math.max(200, chart(name).clientWidth || 320));

  function drawPaths() {
    if (!clip.paths.length) return fillTable("paths");
    const colours = pathColours();
    const kind = (name) => (name.startsWith("sample ") ? "sample" : name);
    const paths = clip.paths.flatMap(({ name, points }) => points.map(([t, x, y]) => ({
      path: name, kind: kind(name), t, x, y, colour: colours[kind(name)], width: name === `sample ${state.sample}` ? 3.5 : 1.8,
    })));
    const { x, y } = clip.extent;
    const shape = (y[1] - y[0]) / (x[1] - x[0]);
    const width = Math.min(roomFor("paths", 680) - 62, 460 / shape);
    const signals = { x_from: x[0], x_to: x[1], y_from: y[0], y_to: y[1] };
    draw("paths", { paths }, { signals, width, height: width * shape, label: `Paths from above: ${clip.paths.map((each) => each.name).join(", ")}` });
    part("paths-legend").replaceChildren(...Object.entries({ history: "┄┄ history", "what the vehicle did": "— — what the vehicle did", sample: "―― samples, the one chosen thick" })
      .filter(([name]) => clip.paths.some((each) => kind(each.name) === name)).map(([name, text]) => {
        const dash = element("b", { textContent: text.slice(0, 3), ariaHidden: "true" });
        dash.style.color = colours[name];
        return element("li", {}, dash, text.slice(3));
      }));
    fillTable("paths");
  }

  function pathColours() {
    const dark = document.documentElement.dataset.theme === "dark";
    return { history: colour("--muted"), "what the vehicle did": dark ? "#2fc99b" : "#007a58", sample: dark ? "#56B4E9" : "#0072B2" };
  }

  function drawTiming() {
    const now = rounds()[state.round]?.index;
    const bars = clip.bars.map((bar) => ({ ...bar, colour: bar.round !== null && bar.round === now ? colour("--bad") : colour("--accent") }));
    const end = Math.max(0, ...clip.bars.map((bar) => bar.end_ms));
    chart("timing").hidden = bars.length === 0;
    if (bars.length) draw("timing", { bars }, { width: roomFor("timing", 820) - 90, label: `The clip’s time by part, ${end.toFixed(1)} ms in all` });
    fillTable("timing");
  }

  // The tables behind the graphics, made when they are opened.
  const tables = {
    tree: () => [["token", "text"], ["after", "text"], ["source", "text"], ["state", "text"], ["target’s p", ""], ["rank in target", ""], ["draft’s p", ""], ["rank in draft", ""]],
    paths: () => [["t, s", ""], ...clip.paths.flatMap(({ name }) => [[`${name}: forward, m`, ""], [`${name}: left, m`, ""]])],
    timing: () => [["part", "text"], ["pass", ""], ["from, ms", ""], ["to, ms", ""], ["takes, ms", ""]],
  };
  const lines = {
    tree: () => (round()?.nodes ?? []).map((node) => [blanks(node.piece), node.parent < 0 ? "" : blanks(round().nodes[node.parent].piece), node.source, node.state === "own" ? "the target’s own" : node.state,
      percent(node.p), rank(node.rank), percent(node.q), rank(node.draft_rank)]),
    paths: () => {
      const times = [...new Set(clip.paths.flatMap(({ points }) => points.map(([t]) => t)))].sort((one, other) => one - other);
      const at = clip.paths.map(({ points }) => new Map(points.map(([t, x, y]) => [t, [x, y]])));
      return times.map((t) => [t.toFixed(1), ...at.flatMap((points) => (points.get(t) ?? ["", ""]).map((value) => (value === "" ? "" : value.toFixed(2))))]);
    },
    timing: () => clip.bars.map((bar) => [bar.name, bar.round === null ? "" : String(bar.round), bar.start_ms.toFixed(2), bar.end_ms.toFixed(2), (bar.end_ms - bar.start_ms).toFixed(2)]),
  };

  function fillTable(name) {
    const details = view.querySelector(`details[data-clip-table="${name}"]`);
    details.querySelector(".scroll")?.remove();
    if (!details.open) return;
    const columns = tables[name]();
    const heads = columns.map(([text, kind]) => element("th", { scope: "col", className: kind, textContent: text }));
    const rows = lines[name]().map((line) => element("tr", {}, ...line.map((text, column) => element("td", { className: columns[column][1] }, element("bdi", { textContent: text })))));
    const box = element("div", { className: "scroll", tabIndex: 0 }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows)));
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", `Table of ${name}`);
    details.append(box);
  }

  for (const details of view.querySelectorAll("details[data-clip-table]")) {
    details.addEventListener("toggle", () => clip && fillTable(details.dataset.clipTable));
  }

  // Frames.
  const moment = (frame) => (frame.time_s === 0 ? "now" : `${frame.time_s.toFixed(1)} s`.replace("-", "−"));
  const caption = (frame) => `${frame.camera}, ${moment(frame)}`;

  function showFrames() {
    part("frames-section").hidden = clip.frames.length === 0;
    let camera = null;
    const made = clip.frames.flatMap((frame, number) => {
      const head = frame.camera === camera ? [] : [element("h4", { textContent: frame.camera })];
      camera = frame.camera;
      const image = element("img", { alt: caption(frame), src: pictures[frame.picture], decoding: "async" });
      const button = element("button", { type: "button" }, image, element("span", { textContent: moment(frame), ariaHidden: "true" }));
      button.addEventListener("click", () => showFrame(number));
      return [...head, button];
    });
    part("frames").replaceChildren(...made);
  }

  let enlarged = 0;
  function showFrame(number) {
    enlarged = clamp(number, clip.frames.length);
    const frame = clip.frames[enlarged];
    Object.assign(frameDialog.querySelector("img"), { src: pictures[frame.picture], alt: caption(frame) });
    document.getElementById("clip-frame-title").textContent = `${caption(frame)} (${enlarged + 1} of ${clip.frames.length})`;
    if (!frameDialog.open) frameDialog.showModal();
  }

  // Keyboard and mouse.
  const actions = {
    close: () => { window.location.hash = list.hash || "#clips"; },
    "clip-back": () => step(-1),
    "clip-on": () => step(1),
    "round-back": () => go({ round: clamp(state.round - 1, rounds().length) }, true),
    "round-on": () => go({ round: clamp(state.round + 1, rounds().length) }, true),
    "sample-back": () => go({ sample: clamp(state.sample - 1, clip.samples.length), round: 0 }, true),
    "sample-on": () => go({ sample: clamp(state.sample + 1, clip.samples.length), round: 0 }, true),
    keys: () => keysDialog.showModal(),
    "keys-close": () => keysDialog.close(),
    "frame-back": () => showFrame(enlarged - 1),
    "frame-on": () => showFrame(enlarged + 1),
    "frame-close": () => frameDialog.close(),
  };
  const keys = {
    ArrowLeft: "round-back", ArrowRight: "round-on", ArrowUp: "clip-back", ArrowDown: "clip-on", k: "clip-back", j: "clip-on",
    "[": "sample-back", "]": "sample-on", Escape: "close",
  };
  const frameKeys = { ArrowLeft: "frame-back", ArrowRight: "frame-on" };

  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", () => actions[button.dataset.do]());

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    let action;
    if (frameDialog.open) action = frameKeys[event.key];
    else if (keysDialog.open) action = undefined;
    else if (event.key === "?") action = "keys";
    else if (!view.hidden && !(event.key.startsWith("Arrow") && event.target.closest("[data-scrolls], .scroll"))) action = keys[event.key];
    if (action === undefined) return;
    event.preventDefault();
    actions[action]();
  });

  let waiting = null;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (clip) redraw(); }, 150);
  });
  function redraw() {
    if (sample().first !== undefined) drawTree();
    drawTiming();
    drawPaths();
  }
  window.addEventListener("themechange", () => { if (clip) redraw(); });
  window.addEventListener("hashchange", follow);
  follow();
})();
