"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const [judge, low, high, sort, speed, all] =
  ["judge", "low", "high", "sort", "speed", "all"].map(by);
const HOLD_S = 0.6; // the last frame, where success shows, stays a little
const sheets = new Map(); // one picture per clip, whichever judges show it
let players = [];
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

class Player {
  constructor(entry) {
    this.entry = entry;
    this.clip = data.clips[entry.clip];
    this.card = by("card").content.firstElementChild.cloneNode(true);
    const part = (name) => this.card.querySelector(name);
    this.canvas = part("canvas");
    [this.canvas.width, this.canvas.height] = this.clip.size;
    this.paper = this.canvas.getContext("2d");
    [this.button, this.scrub, this.counter] = [part(".play"), part(".scrub"), part(".frame")];
    this.card.classList.toggle("right", entry.outcome.startsWith("true"));
    this.card.dataset.clip = entry.clip;
    part(".outcome").textContent = entry.outcome;
    part(".score").textContent = entry.score.toFixed(3);
    part(".bar i").style.width = `${100 * entry.score}%`;
    const { episode, first, transitions, events } = this.clip;
    part("footer").textContent = `clip ${entry.clip}, episode ${episode}, steps ${first} to ` +
      `${first + transitions - 1}. Happened: ${events.join(", ") || "nothing"}.`;
    this.scrub.max = this.clip.order.length - 1;
    this.scrub.addEventListener("input", () => { this.play(false); this.show(+this.scrub.value); });
    this.button.addEventListener("click", () => this.play(!this.playing));
    this.play(playing);
    this.picture(entry.clip).decode().then(() => this.show(0));
  }

  picture(clip) {
    if (!sheets.has(clip)) {
      const image = new Image();
      image.src = this.clip.sheet;
      sheets.set(clip, image);
    }
    return (this.sheet = sheets.get(clip));
  }

  play(on) {
    this.playing = on;
    this.time = 0;
    this.button.textContent = on ? "❚❚" : "►";
    this.button.setAttribute("aria-label", on ? "pause" : "play");
  }

  show(frame) {
    this.frame = frame;
    const { order, columns, size: [width, height] } = this.clip;
    const [x, y] = [order[frame] % columns, Math.floor(order[frame] / columns)];
    this.paper.drawImage(this.sheet, x * width, y * height, width, height, 0, 0, width, height);
    this.card.dataset.frame = this.scrub.value = frame;
    this.counter.textContent = `${frame + 1}/${order.length}`;
  }

  advance(seconds) {
    if (!this.playing || this.frame === undefined) return;
    this.time += seconds;
    const last = this.clip.order.length - 1;
    const stay = 1 / speed.value + (this.frame === last ? HOLD_S : 0);
    if (this.time < stay) return;
    this.time = Math.min(this.time - stay, stay); // a hidden tab does not race afterwards
    this.show(this.frame === last ? 0 : this.frame + 1);
  }
}

function fill() {
  const chosen = data.judges[judge.value];
  const wanted = new Set([...document.querySelectorAll("#outcomes input:checked")].map((b) => b.value));
  const from = low.value === "" ? 0 : +low.value, to = high.value === "" ? 1 : +high.value;
  const shown = chosen.entries.filter((entry) =>
    wanted.has(entry.outcome) && entry.score >= from && entry.score <= to);
  if (sort.value) shown.sort((a, b) => (sort.value === "up" ? 1 : -1) * (a.score - b.score));
  players = shown.map((entry) => new Player(entry));
  by("cards").replaceChildren(...players.map((player) => player.card));
  by("count").textContent = `${shown.length} of ${chosen.entries.length} clips`;
  by("asked").hidden = !chosen.prompts.length;
  by("asked").lastElementChild.replaceChildren(...chosen.prompts.map((prompt) => {
    const line = document.createElement("p");
    line.textContent = prompt;
    return line;
  }));
}

function label() {
  all.textContent = playing ? "pause all" : "play all";
  by("fps").textContent = `${speed.value} fps`;
}

data.judges.forEach((each, k) => judge.add(new Option(each.name, k)));
for (const outcome of data.outcomes) {
  const line = document.createElement("label"), box = document.createElement("input");
  Object.assign(box, { type: "checkbox", checked: true, value: outcome });
  line.append(box, outcome);
  by("outcomes").append(line);
}
for (const control of [judge, by("outcomes"), low, high, sort]) control.addEventListener("input", fill);
speed.addEventListener("input", label);
by("controls").addEventListener("submit", (event) => event.preventDefault());
all.addEventListener("click", () => {
  playing = !playing;
  players.forEach((player) => player.play(playing));
  label();
});
fill();
label();
let before = performance.now();
requestAnimationFrame(function tick(now) {
  const seconds = (now - before) / 1000;
  before = now;
  players.forEach((player) => player.advance(seconds));
  requestAnimationFrame(tick);
});
