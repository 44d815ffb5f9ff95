"use strict";
(() => {
  const root = document.documentElement;
  root.classList.remove("no-script");
  const find = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const wish = new Map(location.hash.slice(1).split("&").filter(Boolean).map((part) => part.split("=")));

  // Theme: the system's, until somebody chooses.
  const themeButton = find("#theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => { themeButton.textContent = dark() ? "Light" : "Dark"; };
  if (wish.has("theme")) root.dataset.theme = wish.get("theme") === "dark" ? "dark" : "light";
  themeButton.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; nameTheme(); });
  nameTheme();

  // Tables: a click or Enter on a heading sorts; numbers by value, missing ones last either way.
  const key = (cell) => {
    if (cell.dataset.v === undefined) return cell.textContent.trim() === "–" ? null : cell.textContent.trim();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  const sortBy = (table, column, down) => {
    const sign = down ? -1 : 1;
    const rows = all("tbody tr", table).map((row) => [key(row.cells[column]), row]);
    rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    find("tbody", table).append(...rows.map(([, row]) => row));
    all("th", table).forEach((th, index) =>
      th.setAttribute("aria-sort", index !== column ? "none" : down ? "descending" : "ascending"));
  };
  for (const table of all("table.data")) {
    all("th button", table).forEach((button, column) => button.addEventListener("click", () => {
      const now = button.parentElement.getAttribute("aria-sort");
      const numeric = button.parentElement.classList.contains("num");
      sortBy(table, column, now === "none" ? numeric : now === "ascending");
    }));
  }
  if (wish.has("sort")) {
    const [id, column, order] = wish.get("sort").split(":");
    sortBy(document.getElementById(id), Number(column), order === "desc");
  }

  // Copy and download.
  const flash = (button, words) => {
    const before = button.textContent;
    button.textContent = words;
    setTimeout(() => { button.textContent = before; }, 1500);
  };
  const copyBySelection = (source) => {
    const range = document.createRange();
    range.selectNodeContents(source);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    return document.execCommand("copy");
  };
  for (const button of all("[data-copy]")) button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    let done = false;
    try {
      await navigator.clipboard.writeText(source.textContent);
      done = true;
    } catch {
      done = copyBySelection(source);
    }
    if (done) flash(button, "Copied");
    else { source.scrollIntoView(); copyBySelection(source); flash(button, "Press Ctrl+C"); }
  });
  for (const button of all("[data-download]")) button.addEventListener("click", () => {
    const link = document.createElement("a");
    const words = document.getElementById(button.dataset.download).textContent;
    link.href = URL.createObjectURL(new Blob([words], { type: "application/json" }));
    link.download = button.dataset.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  const details = find("details");
  if (details) details.addEventListener("toggle", () => {
    const rows = JSON.parse(find("#rows").textContent);
    find("#rows-text").textContent = rows.map((row) => JSON.stringify(row)).join("\n");
  });

  // Player: three canvases in step, the difference computed here from the two others.
  const player = find("#player");
  if (!player) return;
  const strips = JSON.parse(find("#strips").textContent);
  const sheets = all(".sheets img");
  const canvases = all("canvas", player);
  const captions = all("figcaption", player);
  const slider = find("#frame");
  const play = find("#play");
  let strip = 0, frame = 0, timer = null;

  const draw = () => {
    const { width, height, frames } = strips[strip];
    const pixels = [0, 1].map((side) => {
      const context = canvases[side].getContext("2d", { willReadFrequently: true });
      context.drawImage(sheets[2 * strip + side], frame * width, 0, width, height, 0, 0, width, height);
      return context.getImageData(0, 0, width, height);
    });
    const difference = new ImageData(width, height);
    for (let i = 0; i < difference.data.length; i += 4) {
      for (let c = 0; c < 3; c++) difference.data[i + c] = 5 * Math.abs(pixels[0].data[i + c] - pixels[1].data[i + c]);
      difference.data[i + 3] = 255;
    }
    canvases[2].getContext("2d").putImageData(difference, 0, 0);
    slider.value = frame;
    find("#frame-number").textContent = `${frame + 1} / ${frames}`;
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const start = () => {
    stop();
    play.textContent = "Pause";
    timer = setInterval(() => { frame = (frame + 1) % strips[strip].frames; draw(); }, 1000 / strips[strip].fps);
  };
  const show = (index) => {
    strip = index;
    const chosen = strips[strip];
    frame = Math.min(frame, chosen.frames - 1);
    for (const canvas of canvases) { canvas.width = chosen.width; canvas.height = chosen.height; }
    slider.max = chosen.frames - 1;
    find(".transport").hidden = chosen.frames < 2;
    chosen.labels.forEach((words, side) => { captions[side].textContent = words; });
    find("#h-strip").textContent = chosen.heading;
    find("#strip-sample").textContent = chosen.sample;
    find("#strip-text").textContent = chosen.caption;
    all("[data-strip]").forEach((button, i) => button.setAttribute("aria-pressed", String(i === strip)));
    draw();
  };
  all("[data-strip]").forEach((button, index) => button.addEventListener("click", () => show(index)));
  slider.addEventListener("input", () => { stop(); frame = Number(slider.value); draw(); });
  play.addEventListener("click", () => timer === null ? start() : stop());
  Promise.all(sheets.map((image) => image.decode())).then(() => {
    const asked = strips.findIndex((candidate) => candidate.role === decodeURIComponent(wish.get("strip") ?? ""));
    frame = wish.has("frame") ? Number(wish.get("frame")) : 0;
    show(Math.max(asked, 0));
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches || wish.has("frame");
    if (!still && strips[strip].frames > 1) start();
    player.dataset.ready = "yes";
  });
})();
