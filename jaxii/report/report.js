"use strict";
// Sorts, searches and pages the labels, and marks them on the map.
// Without it the page shows all figures and the ends of the table.
(() => {
  const PAGE = 25;
  const REACH_PIXELS = 28;
  const root = document.documentElement;

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function contents() {
    const links = new Map();
    for (const link of document.querySelectorAll(".contents a")) {
      links.set(link.getAttribute("href").slice(1), link);
    }
    const seen = new Set();
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) seen.add(entry.target.id);
        else seen.delete(entry.target.id);
      }
      const first = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) {
        if (id === first) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-10% 0px -60% 0px" });
    for (const id of links.keys()) watcher.observe(document.getElementById(id));
  }

  // Only regions that scroll are stops of the Tab key.
  function stops() {
    const watcher = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
        else target.removeAttribute("tabindex");
      }
    });
    for (const part of document.querySelectorAll(".scroll, .wide-figure")) {
      watcher.observe(part);
    }
  }

  function print() {
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details:not([open])")];
      for (const part of opened) part.open = true;
    });
    addEventListener("afterprint", () => {
      for (const part of opened) part.open = false;
    });
  }

  // Returns the labels ordered by a column; missing values are last in both directions.
  function orderBy(values, descending) {
    const known = [], missing = [];
    values.forEach((value, i) => (value === null ? missing : known).push(i));
    const sign = descending ? -1 : 1;
    known.sort((a, b) => sign * (values[a] - values[b]) || a - b);
    return known.concat(missing);
  }

  function table(data, pick) {
    const explorer = document.querySelector(".explorer");
    const search = explorer.querySelector("input");
    const found = explorer.querySelector(".found");
    const body = explorer.querySelector("tbody");
    const heads = [...explorer.querySelectorAll("thead th[aria-sort]")];
    const [previous, next] = explorer.querySelectorAll(".pager button");
    const where = explorer.querySelector(".pager span");
    const count = data.names.length;
    const whole = new Intl.NumberFormat("en");
    const forms = data.columns.map((column) => new Intl.NumberFormat("en", {
      minimumFractionDigits: column.digits, maximumFractionDigits: column.digits,
    }));
    const collator = new Intl.Collator(undefined, { numeric: true });
    const alphabet = data.names.map((_, i) => i)
      .sort((a, b) => collator.compare(data.names[a], data.names[b]) || a - b);
    const rank = new Array(count);
    alphabet.forEach((label, place) => { rank[label] = place; });
    const sought = data.names.map((name, i) => `${name}\n${data.codes[i]}`.toLowerCase());
    let order = alphabet, shown = alphabet, page = 0;

    function row(label) {
      const line = element("tr");
      const name = element("th", undefined, { scope: "row" });
      const text = element("bdi", data.names[label]);
      if (pick) {
        const button = element("button", undefined, { type: "button", class: "label" });
        button.append(text);
        button.addEventListener("click", () => pick(label, true));
        name.append(button);
      } else name.append(text);
      if (data.codes[label]) {
        const code = element("span", undefined, { class: "code" });
        code.append(element("bdi", data.codes[label]));
        name.append(" ", code);
      }
      line.append(name);
      data.columns.forEach((column, i) => {
        const value = column.values[label];
        const text = value === null ? "–" : forms[i].format(value);
        line.append(element("td", text, { class: "num" }));
      });
      if (data.nearest.length) {
        const cell = element("td", undefined, { class: "near" });
        data.nearest[label].forEach((other, i) => {
          if (i) cell.append(", ");
          cell.append(element("bdi", data.names[other]));
        });
        line.append(cell);
      }
      return line;
    }

    function show() {
      const pages = Math.max(1, Math.ceil(shown.length / PAGE));
      page = Math.min(page, pages - 1);
      const part = shown.slice(page * PAGE, (page + 1) * PAGE);
      body.replaceChildren(...part.map(row));
      const all = `${whole.format(count)} labels`;
      found.textContent = shown.length === count ? all
        : `${whole.format(shown.length)} of ${all}`;
      where.textContent = `Page ${whole.format(page + 1)} of ${whole.format(pages)}`;
      // `disabled` would take the focus away from the button.
      previous.setAttribute("aria-disabled", String(page === 0));
      next.setAttribute("aria-disabled", String(page === pages - 1));
    }

    function filter() {
      const words = search.value.trim().toLowerCase();
      shown = words ? order.filter((label) => sought[label].includes(words)) : order;
      page = 0;
      show();
    }

    function sort(column) {
      const now = heads[column].getAttribute("aria-sort");
      // The first click sorts names from A and figures from the largest.
      const descending = now === "none" ? column > 0 : now === "ascending";
      heads.forEach((head) => head.setAttribute("aria-sort", "none"));
      heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
      order = orderBy(column ? data.columns[column - 1].values : rank, descending);
      filter();
    }

    function turn(by) {
      const pages = Math.max(1, Math.ceil(shown.length / PAGE));
      page = Math.min(Math.max(page + by, 0), pages - 1);
      show();
    }

    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(column));
    });
    search.addEventListener("input", filter);
    previous.addEventListener("click", () => turn(-1));
    next.addEventListener("click", () => turn(1));
    explorer.hidden = false;
    root.classList.add("js");
    sort(heads.length > 1 ? 1 : 0);
  }

  function map(data) {
    const drawing = document.querySelector("svg.map");
    const picked = document.querySelector(".picked");
    if (!drawing) return null;
    const { ids, x, y, cosines } = data.map;
    const place = new Map(ids.map((label, i) => [label, i]));
    const marks = drawing.querySelector(".marks");

    function mark(tag, attributes, text) {
      const made = document.createElementNS(drawing.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      if (text !== undefined) made.textContent = text;
      marks.append(made);
    }

    function title(label, i, kind) {
      const short = [...data.names[label]];
      const text = short.length > 40 ? `${short.slice(0, 39).join("")}…` : short.join("");
      const end = x[i] > 700;
      mark("text", {
        x: x[i] + (end ? -10 : 10), y: y[i] + 5, class: kind,
        "text-anchor": end ? "end" : "start",
      }, text);
    }

    function pick(label, fromTable = false) {
      const at = place.get(label);
      marks.replaceChildren();
      drawing.classList.toggle("has-marks", at !== undefined);
      const name = element("b");
      name.append(element("bdi", data.names[label]));
      picked.replaceChildren(name);
      // Moves the focus as a link within the page would.
      if (fromTable) {
        picked.closest("section").scrollIntoView();
        picked.focus({ preventScroll: true });
      }
      if (at === undefined) {
        picked.append(" occurs with no other label and is not on the map.");
        return;
      }
      const near = data.nearest[label].filter((other) => place.has(other));
      for (const other of near) {
        const i = place.get(other);
        mark("line", { x1: x[at], y1: y[at], x2: x[i], y2: y[i] });
        mark("circle", { cx: x[i], cy: y[i], r: 5, class: "near" });
      }
      mark("circle", { cx: x[at], cy: y[at], r: 7 });
      for (const other of near) title(other, place.get(other), "near");
      title(label, at, "this");
      picked.append(" is nearest to ");
      near.forEach((other, i) => {
        if (i) picked.append(", ");
        const button = element("button", undefined, { type: "button", class: "label" });
        button.append(element("bdi", data.names[other]));
        button.addEventListener("click", () => pick(other));
        picked.append(button, ` (cosine ${cosines[at][i].toFixed(2)})`);
      });
      picked.append(".");
    }

    drawing.addEventListener("click", (event) => {
      const to = drawing.getScreenCTM().inverse();
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(to);
      let best = -1, least = (REACH_PIXELS * to.a) ** 2;
      for (let i = 0; i < ids.length; i++) {
        const distance = (x[i] - point.x) ** 2 + (y[i] - point.y) ** 2;
        if (distance < least) [best, least] = [i, distance];
      }
      if (best >= 0) pick(ids[best]);
    });
    picked.hidden = false;
    return pick;
  }

  contents();
  stops();
  print();
  const held = document.getElementById("label-data");
  if (held) {
    const data = JSON.parse(held.textContent);
    table(data, map(data));
  }
})();
