"use strict";

// Light or dark: what the system says, until the button is pressed.
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.hidden = false;
theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
system.addEventListener("change", nameTheme);
nameTheme();

// Tabs (ARIA Authoring Practices): links to the sections become tabs; without this script all sections are shown.
for (const nav of document.querySelectorAll(".tabs")) {
  const tabs = [...nav.querySelectorAll("a")];
  const panelOf = (tab) => document.getElementById(tab.hash.slice(1));
  const show = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      panelOf(tab).hidden = tab !== chosen;
    }
    chosen.scrollIntoView({ block: "nearest", inline: "nearest" });
  };
  const follow = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const tab = target && tabs.find((own) => panelOf(own).contains(target));
    if (tab) { show(tab); target.scrollIntoView(); }
  };
  nav.querySelector("ul").setAttribute("role", "tablist");
  tabs.forEach((tab, index) => {
    const panel = panelOf(tab);
    tab.id = `tab-${panel.id}`;
    tab.parentElement.setAttribute("role", "presentation");
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    panel.tabIndex = 0;
    tab.addEventListener("click", (event) => { event.preventDefault(); history.replaceState(null, "", tab.hash); show(tab); });
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const next = { ArrowRight: index === last ? 0 : index + 1, ArrowLeft: index ? index - 1 : last, Home: 0, End: last, " ": index }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      tabs[next].focus();
      tabs[next].click();
    });
  });
  show(tabs[0]);
  follow();
  addEventListener("hashchange", follow);
}

// One tooltip for all figures: under the pointer, or at the cell that the arrow keys chose.
const tip = document.getElementById("tip");
const tell = (text, x, y) => {
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
};
const hush = () => { tip.hidden = true; };
addEventListener("scroll", hush, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });

const STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
for (const map of document.querySelectorAll("svg.cells")) {
  const rows = [...map.querySelectorAll("g[data-row]")].map((row) => [...row.querySelectorAll("rect[data-t]")]);
  const textOf = (cell) => `${cell.parentNode.dataset.row}\n${cell.dataset.t}`;
  let active = null;
  const choose = (cell) => {
    active?.classList.remove("active");
    active = cell;
    cell.classList.add("active");
    cell.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
    const box = cell.getBoundingClientRect();
    setTimeout(() => tell(textOf(cell), box.right - 8, box.bottom - 12));
  };
  const beside = ([down, right]) => {
    const row = rows.findIndex((own) => own.includes(active));
    if (right) return rows[row][rows[row].indexOf(active) + right];
    for (let next = row + down; rows[next]; next += down) {
      const cell = rows[next].find((own) => own.getAttribute("x") === active.getAttribute("x"));
      if (cell) return cell;
    }
  };
  map.addEventListener("pointermove", (event) => {
    if (event.target.dataset.t) tell(textOf(event.target), event.clientX, event.clientY);
    else hush();
  });
  map.addEventListener("pointerleave", hush);
  map.addEventListener("focus", () => { if (map.matches(":focus-visible")) choose(active ?? map.querySelector("rect[data-t]") ?? map); });
  map.addEventListener("blur", () => { active?.classList.remove("active"); hush(); });
  map.addEventListener("keydown", (event) => {
    if (!STEPS[event.key] || !active) return;
    event.preventDefault();
    const next = beside(STEPS[event.key]);
    if (next) choose(next);
  });
}

for (const plot of document.querySelectorAll("svg.lines")) {
  const { left, right, longest, x, series } = JSON.parse(plot.dataset.plot);
  const guide = plot.querySelector(".guide");
  let position = 1;
  const choose = (wanted) => {
    position = Math.min(longest, Math.max(1, wanted));
    const place = left + ((right - left) * (position - 1)) / Math.max(longest - 1, 1);
    guide.setAttribute("x1", place);
    guide.setAttribute("x2", place);
    guide.setAttribute("visibility", "visible");
    const box = plot.getBoundingClientRect();
    const lines = series.filter(([, values]) => values[position - 1] !== undefined).map(([name, values]) => `${name}: ${values[position - 1]}`);
    tell([`${x} ${position}`, ...lines].join("\n"), box.left + (place * box.width) / plot.viewBox.baseVal.width, box.top + box.height / 3);
  };
  const leave = () => { guide.setAttribute("visibility", "hidden"); hush(); };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * plot.viewBox.baseVal.width - left) / (right - left);
    choose(Math.round(1 + share * (longest - 1)));
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) choose(position); });
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(position + step);
  });
}

// Copy buttons; where the clipboard is closed, the text is selected instead.
for (const block of document.querySelectorAll(".code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const code = block.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } catch {
      getSelection().selectAllChildren(code);
    }
  });
  block.append(button);
}
