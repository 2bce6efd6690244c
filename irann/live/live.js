// The live pieces of the book: models that write, and are looked into, in the page, without Python.
//
//   worker      engine.wasm with one model, in a thread of its own: jobs come in, parts of answers go out
//   Model       that worker seen from the page: fetches engine and weights when it is first asked
//   parts       what pieces are made of: text field, slider, choice, letters with a shade, bars
//   pieces      cost, attention, rounds, denoise, forget, write, chat
//
// A page opened from a disk may not fetch, so that engine.js, counts.js and MODEL.js are classic scripts beside this
// one, which fill in `irannLive`. What is typed goes into the page as text, never as markup. No other request is made.
"use strict";
window.irannLive = window.irannLive || { models: {}, engine: null, counts: null };
(() => {
// ------------------------------------------------------------------------------------------ worker
// All of it runs in the worker, which is started from this function's own text.
function worker() {
  const KINDS = ["gpt", "thinker", "mamba", "diffusion", "thinker-page"];
  const NAMES = ["magic", "kind", "vocabulary", "window", "layers", "heads", "width", "inner", "prelude", "core", "rounds",
    "gained", "state", "conv", "rank", "channels", "neighbours", "levels", "bayes", "conditioned"];
  let engine, c, alphaBar, cumulative;  // exports, the numbers of its Config, and two tables of diffusion
  const floats = (pointer, n) => new Float32Array(engine.memory.buffer, pointer, n);
  const whole = (pointer, n) => new Int32Array(engine.memory.buffer, pointer, n);
  const put = ids => whole(engine.get_ids(), ids.length).set(ids);
  function bytes(base64) {
    const signs = atob(base64), to = new Uint8Array(signs.length);
    for (let i = 0; i < to.length; i++) to[i] = signs.charCodeAt(i);
    return to;
  }

  // Numbers from a seed (mulberry32), so that a link writes the same text again.
  function random(seed) {
    return () => {
      seed = seed + 0x6d2b79f5 | 0;
      let x = Math.imul(seed ^ seed >>> 15, 1 | seed);
      x = x + Math.imul(x ^ x >>> 7, 61 | x) ^ x;
      return ((x ^ x >>> 14) >>> 0) / 4294967296;
    };
  }
  const exponential = (u, n) => floats(engine.get_noise(), n).forEach((_, i, to) => { to[i] = Math.max(1e-20, -Math.log(1 - u())); });
  const normal = (to, u) => to.forEach((_, i) => { to[i] = Math.sqrt(-2 * Math.log(1 - u())) * Math.cos(2 * Math.PI * u()); });

  function nats(logits, id) {  // the negative log-likelihood of a character
    const most = Math.max(...logits);
    return most + Math.log(logits.reduce((sum, x) => sum + Math.exp(x - most), 0)) - logits[id];
  }

  // Diffusion's noise levels, where text takes shape most densely, as Denoiser.timesteps has them.
  function timesteps(steps) {
    const levels = [];
    for (let i = 0; i < steps; i++) {
      const found = cumulative.findIndex(p => p >= (i + 0.5) / steps);
      levels.push(i == steps - 1 ? c.levels : Math.max(found + 1, i ? levels[i - 1] + 1 : 1));
    }
    return levels.reverse().map((tau, i) => Math.min(tau, c.levels - i));
  }
  const signal = tau => tau ? alphaBar[tau - 1] : 1;

  // One page: positions of `ids` where `mask` is 1 are written; what it looks like after each step.
  function* page(ids, mask, { steps = 0, eta = 1, temperature = 1, threshold = 0.5 }, u) {
    const t = ids.length;
    put(ids);
    new Uint8Array(engine.memory.buffer, engine.get_mask(), t).set(mask);
    engine.page(t);
    const answer = settled => ({ ids: [...whole(engine.get_shown(), t)], settled });
    if (c.kind == "diffusion") {
      normal(floats(engine.get_noisy(), t * c.channels), u);
      const levels = [...timesteps(steps || 16), 0];
      for (let i = 0; levels[i]; i++) {
        normal(floats(engine.get_noise(), t * c.channels), u);
        yield answer(engine.denoise(signal(levels[i]), signal(levels[i + 1]), eta, temperature));
      }
      return;
    }
    engine.set_rule(threshold, 0);
    steps = steps || Math.ceil(mask.reduce((sum, one) => sum + one, 0) / 4);
    for (let masked = 1, left = steps; masked && left; left--) {
      exponential(u, t * c.vocabulary);
      masked = engine.refine(left, temperature);
      const still = new Uint8Array(engine.memory.buffer, engine.get_mask(), t).indexOf(1);
      yield answer(still < 0 ? t : still);
    }
  }

  const jobs = {
    // n characters after a prompt; `until` ends what is written when it ends so, once it has begun.
    *write({ ids, n, temperature, seed, until, ...how }) {
      const u = random(seed), text = [...ids], began = performance.now();
      const answer = settled => ({ ids: [...text], settled, rate: (text.length - ids.length) / (performance.now() - began) * 1000 });
      if (c.channels || c.kind == "thinker-page") {
        while (text.length < ids.length + n) {
          const first = text.length, end = Math.min(first + c.page, ids.length + n), begin = Math.max(0, end - c.window - 1);
          while (text.length < end) text.push(0);
          const mask = text.slice(begin).map((_, i) => begin + i < first ? 0 : 1);
          for (const draft of page(text.slice(begin), mask, { temperature, ...how }, u)) {
            text.splice(begin, end - begin, ...draft.ids);
            yield answer(begin + draft.settled);
          }
        }
        return;
      }
      if (c.kind == "thinker") engine.set_rule(how.threshold === undefined ? 0.5 : how.threshold, 0);
      put(ids);
      engine.restart(ids.length);
      let shown = 0;
      for (let i = 0; i < n; i++) {
        exponential(u, c.vocabulary);
        text.push(engine.choose(temperature));
        const said = text.slice(ids.length), ends = until && said.slice(-until.length).join() == until.join();
        const over = ends && said.some(id => !until.includes(id));  // line ends before a word are no end
        if (over || performance.now() - shown > 40 || i == n - 1) {
          yield answer(text.length);
          shown = performance.now();
        }
        if (over) return;
        engine.push(text[text.length - 1]);
      }
    },

    // What each character of a text costs, and the rounds that it took; the first is preceded by `before`.
    *score({ ids, before, threshold = 0.5, rounds = 0 }) {
      if (c.kind == "thinker") engine.set_rule(threshold, rounds);
      put([before]);
      engine.restart(1);
      const cost = [], taken = [];
      let shown = performance.now();
      for (const id of ids) {
        cost.push(nats([...floats(engine.get_logits(), c.vocabulary)], id));
        taken.push(engine.get_rounds());
        engine.push(id);
        if (performance.now() - shown > 50) {
          yield { cost: [...cost], rounds: [...taken] };
          shown = performance.now();
        }
      }
      yield { cost, rounds: taken, done: true };
    },

    // Attention weights of every position: (t layers heads t) in one array; and the last position's logits.
    *attention({ ids }) {
      const t = ids.length, rows = c.layers * c.heads, maps = new Float32Array(t * rows * t);
      put(ids);
      engine.restart(1);
      for (let i = 0; i < t; i++) {
        if (i) engine.push(ids[i]);
        const weights = floats(engine.get_attention(), rows * (c.window + 1));
        for (let row = 0; row < rows; row++)
          for (let s = 0; s <= i; s++) maps[(i * rows + row) * t + s] = weights[row * (c.window + 1) + s];
      }
      yield { maps, logits: [...floats(engine.get_logits(), c.vocabulary)] };
    },

    // Of what each layer wrote at each position, the part that is left at the last; and the step sizes.
    *forget({ ids }) {
      put(ids);
      engine.restart(ids.length);
      yield { kept: [...floats(engine.remembered(ids.length), c.layers * ids.length)], step: ids.map((_, i) => engine.step_size(i)) };
    },

    // A text under noise: what the noisy points look like, and what the network makes of them.
    *level({ ids, part, seed }) {
      const u = random(seed), t = ids.length, ch = c.channels, v = c.vocabulary;
      const tau = Math.max(1, Math.round(part * c.levels)), points = floats(engine.get_embeddings(), v * ch);
      put(ids);
      new Uint8Array(engine.memory.buffer, engine.get_mask(), t).fill(1);
      engine.page(t);
      const noisy = floats(engine.get_noisy(), t * ch);
      normal(noisy, u);
      const a = Math.sqrt(signal(tau)), b = Math.sqrt(1 - signal(tau));
      for (let i = 0; i < t * ch; i++) noisy[i] = a * points[ids[i / ch | 0] * ch + i % ch] + b * noisy[i];
      const best = (n, f) => { let top = 0; for (let j = 1; j < n; j++) if (f(j) > f(top)) top = j; return top; };
      const along = (i, j) => { let dot = 0; for (let k = 0; k < ch; k++) dot += noisy[i * ch + k] * points[j * ch + k]; return dot; };
      const near = ids.map((_, i) => best(v, j => along(i, j)));
      engine.see_through(signal(tau));  // twice: the second time it sees its own first guess
      engine.keep_guess(1);
      engine.see_through(signal(tau));
      const logits = floats(engine.get_logits(), t * v), guess = ids.map((_, i) => best(v, j => logits[i * v + j]));
      yield { near, guess, cost: ids.map((id, i) => nats([...logits.subarray(i * v, i * v + v)], id)), tau };
    },

    // A text with gaps, filled step by step.
    *fill({ ids, mask, seed, ...how }) { yield* page(ids, mask, how, random(seed)); },
  };

  function open({ code, data, sha256, page }) {
    engine = new WebAssembly.Instance(new WebAssembly.Module(bytes(code))).exports;
    const file = bytes(data), at = engine.room(file.length);
    new Uint8Array(engine.memory.buffer, at, file.length).set(file);
    const digest = [...new Uint8Array(engine.memory.buffer, engine.sha256(file.length), 32)];
    if (digest.map(b => b.toString(16).padStart(2, "0")).join("") != sha256) throw Error("its weights are damaged: they do not fit their SHA-256");
    const refused = engine.open_model(file.length);
    const reasons = ["", "its weights are no model of this engine", "its weights have a wrong length", "there is too little memory"];
    if (refused) throw Error(reasons[refused]);
    // a page asks for no later ones than these
    c = Object.fromEntries(NAMES.map((name, i) => [name, new Int32Array(file.buffer, 0, 20)[i]]));
    c.kind = KINDS[c.kind];
    c.page = page || c.window + 1 >> 1;
    if (c.levels) [alphaBar, cumulative] = [0, 1].map(i => new Float64Array(file.buffer, 88 + 8 * i * c.levels, c.levels));
    return c;
  }

  // One job after the other; each gives way between its parts, so that it can be cancelled.
  const cancelled = new Set(), channel = new MessageChannel();
  const pause = () => new Promise(resolve => { channel.port1.onmessage = resolve; channel.port2.postMessage(0); });
  let last = Promise.resolve();
  async function run({ id, job, given }) {
    try {
      if (job == "open") return postMessage({ id, part: open(given), over: true });
      for (const part of jobs[job](given)) {
        if (cancelled.has(id)) break;
        postMessage({ id, part });
        await pause();
        if (cancelled.has(id)) break;
      }
      postMessage({ id, over: true });
    } catch (error) { postMessage({ id, error: error.message }); }
  }
  onmessage = ({ data }) => {
    if (data.cancel) cancelled.add(data.cancel);
    else last = last.then(() => cancelled.has(data.id) ? postMessage({ id: data.id, over: true }) : run(data));
  };
}

// ------------------------------------------------------------------------------------------- Model
const here = document.currentScript && document.currentScript.src ? document.currentScript.src.replace(/[^/]*$/, "") : "";
const scripts = {};
function load(name) {  // a script beside this one, once
  scripts[name] = scripts[name] || new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = here + name + ".js";
    script.onload = resolve;
    script.onerror = () => { delete scripts[name]; reject(Error(`${name}.js could not be read beside this page`)); };
    document.head.append(script);
  });
  return scripts[name];
}

// The signs of a text as a model spells it that has the signs `known`: accents composed or apart, and what keyboards of
// phones give for quotes and dashes.
const PLAINER = { "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\t": " " };
function spelt(text, known) {
  const forms = [text, text.normalize("NFC"), text.normalize("NFD")].map(form => [...form.replace(/\r\n?/g, "\n")]);
  const lacking = form => form.filter(sign => !known.has(sign)).length;
  const [best] = forms.sort((a, b) => lacking(a) - lacking(b));
  return best.flatMap(sign => known.has(sign) ? sign : [...PLAINER[sign] || sign]);
}

class Model {
  static all = {};
  static named(name) { return Model.all[name] = Model.all[name] || new Model(name); }
  constructor(name) { Object.assign(this, { name, listeners: new Map(), count: 0, running: new Map() }); }

  async open() {  // -> the numbers of its Config
    this.opened = this.opened || this.start().catch(error => { this.opened = null; throw error; });
    return this.opened;
  }
  async start() {
    if (!irannLive.engine) await load("engine");
    if (!irannLive.models[this.name]) await load(this.name);
    const { characters, ...rest } = irannLive.models[this.name];
    this.characters = [...characters];
    this.ids = new Map(this.characters.map((sign, i) => [sign, i]));
    const address = URL.createObjectURL(new Blob([`"use strict";(${worker})()`], { type: "text/javascript" }));
    if (this.thread) this.thread.terminate();  // of an attempt that failed
    this.thread = new Worker(address);
    this.thread.onerror = () => {  // as where a site's own rules forbid it
      for (const { reject } of this.listeners.values()) reject(Error("this page may not start a worker"));
      this.listeners.clear();
    };
    this.thread.onmessage = ({ data }) => {
      const { resolve, reject, heard } = this.listeners.get(data.id);
      if (data.part && heard) heard(data.part);
      if (data.over || data.error) this.listeners.delete(data.id);
      if (data.error) reject(Error(data.error));
      else if (data.over) resolve(data.part);
    };
    return this.config = await this.send("open", { ...rest, code: irannLive.engine });
  }
  send(job, given, heard, id = ++this.count) {
    return new Promise((resolve, reject) => {
      this.listeners.set(id, { resolve, reject, heard });
      this.thread.postMessage({ id, job, given });
    });
  }
  // Ask for a job; what the same asker wanted before is cancelled, and no more is heard of it.
  async ask(asker, job, given, heard) {
    await this.open();
    this.cancel(asker);
    const id = ++this.count;
    this.running.set(asker, id);
    return this.send(job, given, part => this.running.get(asker) == id && heard(part), id);
  }
  cancel(asker) {
    if (this.running.has(asker)) this.thread.postMessage({ cancel: this.running.get(asker) });
    this.running.delete(asker);
  }
  // Text -> ids; what the model does not know is left out, and named.
  encode(text) {
    const signs = spelt(text, this.ids), known = signs.filter(sign => this.ids.has(sign));
    return { ids: known.map(sign => this.ids.get(sign)), signs: known, unknown: [...new Set(signs.filter(sign => !this.ids.has(sign)))] };
  }
  decode(ids) { return ids.map(id => this.characters[id]).join(""); }
  get newline() { return this.ids.has("\n") ? this.ids.get("\n") : 0; }
}

// ------------------------------------------------------------------------------------------- parts
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const seen = sign => ({ "\n": "\u21b5", " ": "\u00a0" })[sign] || sign;
const spoken = sign => ({ "\n": "line end", " ": "space" })[sign] || sign;

// A piece holds its controls by name; their values are its state, which a link keeps.
class Piece {
  constructor(box, kind, models) {
    Object.assign(this, { box, kind, models, controls: {}, started: false, turn: 0, attempts: 0 });
    this.tools = h("div", { class: "irann-tools" });
    this.out = h("div", { class: "irann-out" });
    this.status = h("p", { class: "irann-status", role: "status" });
    this.link = h("a", { class: "irann-link", href: "#" }, "link to this");
    box.replaceChildren(this.tools, this.out, h("div", { class: "irann-foot" }, this.status, this.link));
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", box.dataset.title || kind);
    box.id = "live-" + kind;
    box.classList.add("irann-ready");
    pieces[kind].build(this);
    this.say(pieces[kind].idle || "Touch it: the weights are loaded then.");
    this.keep();
    for (const event of ["pointerdown", "focusin"]) box.addEventListener(event, () => this.touch());
    window.addEventListener("hashchange", () => this.restore());
    this.restore();
  }
  restore() {  // the state that the address keeps
    if (!location.hash.startsWith(`#${this.box.id}?`)) return;
    for (const [name, value] of new URLSearchParams(location.hash.slice(this.box.id.length + 2)))
      if (Object.hasOwn(this.controls, name)) this.controls[name].set(value);
    this.box.scrollIntoView();
    this.started = true;
    this.changed();
    if (pieces[this.kind].run) this.attempt(() => pieces[this.kind].run(this));
  }
  say(text) { this.status.textContent = text; }
  touch() { if (!this.started) { this.started = true; if (pieces[this.kind].update) this.changed(); } }
  keep() {
    const state = new URLSearchParams(Object.entries(this.controls).map(([name, control]) => [name, control.get()]));
    this.link.href = `#${this.box.id}?${state}`;
  }
  get(name) { return this.controls[name].get(); }
  number(name) { return +this.get(name); }
  async changed() {
    this.keep();
    if (!this.started || !pieces[this.kind].update) return;
    this.anew();
    await this.attempt(() => pieces[this.kind].update(this));
  }
  anew() {  // -> the number of a new turn; what was asked for before is cancelled
    for (const name of this.models) Model.named(name).cancel(this);
    return ++this.turn;
  }
  async attempt(action) {
    this.busy(1);
    try { await action(); } catch (error) { this.say(`This cannot run here: ${error.message}.`); }
    this.busy(-1);
  }
  busy(more) {  // a screen reader waits for the end of an answer
    this.attempts += more;
    this.out.setAttribute("aria-busy", this.attempts > 0);
  }
  async model(name = this.models[0]) {
    const model = Model.named(name);
    if (!model.config) this.say(`Loading ${name} ...`);
    try { await model.open(); } catch (error) { throw Error(`${name}: ${error.message}`); }
    return model;
  }
  encode(model, text, most, end = "first") {  // and say what was left out
    const { ids, signs, unknown } = model.encode(text), from = end == "last" ? Math.max(0, ids.length - most) : 0;
    this.left = unknown.length ? ` Left out, for ${model.name} does not know them: ${unknown.map(spoken).join(" ")}.` : "";
    if (ids.length > most) this.left += ` Only the ${end} ${most} characters are read.`;
    return { ids: ids.slice(from, from + most), signs: signs.slice(from, from + most) };
  }
  some(model, text, most) {  // the same, or nothing where there is nothing to read; the piece then says so
    const read = this.encode(model, text, most);
    if (read.ids.length) return read;
    this.nothing("Write a few characters." + this.left);
  }
  nothing(words) {
    this.out.replaceChildren();
    this.say(words);
  }
  add(name, label, input, get, set) {
    this.controls[name] = { get, set };
    this.tools.append(h("label", { class: "irann-" + name }, h("span", {}, label), input));
    return input;
  }
  text(name, label, value, rows = 2) {
    const area = h("textarea", { rows, dir: "auto", spellcheck: "false", oninput: () => this.changed() });
    area.value = value;
    return this.add(name, label, area, () => area.value, text => { area.value = text; });
  }
  slider(name, label, low, high, step, value, show = x => x) {
    const shown = h("output", {}, show(value)), input = h("input", { type: "range", min: low, max: high, step, value });
    let wanted = value;  // a link may want more than `high`, before the model has said how much there is
    const tell = () => { shown.textContent = show(+input.value); input.setAttribute("aria-valuetext", shown.textContent); };
    const set = value => { wanted = value; input.value = value; tell(); };
    input.addEventListener("input", () => { set(input.value); this.changed(); });
    tell();
    this.add(name, label, h("span", { class: "irann-slide" }, input, shown), () => input.value, set);
    this.controls[name].most = high => { input.max = high; set(wanted); };
    return input;
  }
  choice(name, label, options) {
    const select = h("select", { onchange: () => this.changed() }, ...options.map(one => h("option", {}, one)));
    return this.add(name, label, select, () => select.value, value => { if (options.includes(value)) select.value = value; });
  }
  checks(name, label, options, chosen) {
    const boxes = options.map(one => h("input", { type: "checkbox", value: one, onchange: () => this.changed() }));
    boxes.forEach(box => { box.checked = chosen.includes(box.value); });
    const get = () => boxes.filter(box => box.checked).map(box => box.value).join(" ");
    this.controls[name] = { get, set: value => boxes.forEach(box => { box.checked = value.split(" ").includes(box.value); }) };
    this.tools.append(h("fieldset", {}, h("legend", {}, label), ...boxes.map(box => h("label", { class: "irann-check" }, box, box.value))));
  }
  button(label, action) {
    const button = h("button", { type: "button", onclick: () => { this.started = true; this.keep(); this.attempt(action); } }, label);
    this.tools.append(button);
    return button;
  }
}

// Letters in a line, each shaded by a number from 0 to 1, with words for who points at it.
function letters(signs, shade, words, options = {}) {
  const aloud = options.below ? signs.map((sign, i) => `${spoken(sign)} ${options.below(i)}`).join(", ") : signs.join("");
  const line = h("span", { class: "irann-letters", dir: "auto", role: "img", "aria-label": aloud });
  signs.forEach((sign, i) => {
    const letter = h("span", { title: words(i) }, seen(sign));
    letter.style.setProperty("--shade", Math.min(1, Math.max(0, shade(i))).toFixed(3));
    if (options.below) letter.append(h("small", {}, String(options.below(i))));
    if (options.mark === i) letter.classList.add("irann-mark");
    if (options.pick) letter.addEventListener("click", () => options.pick(i));
    line.append(letter);
  });
  return line;
}
// Letters shaded by what they cost, as far as that is known.
const priced = (signs, cost) => letters(signs.slice(0, cost.length), i => cost[i] / 6, i => `${spoken(signs[i])}: ${cost[i].toFixed(2)} nats`);
const row = (name, line, words) => h("div", { class: "irann-row" }, h("b", {}, name), line, h("span", { class: "irann-words" }, words));
const mean = values => values.length ? values.reduce((a, b) => a + b, 0) / values.length : 0;
const any = () => Math.random() * 1e6 | 0;

// The likeliest characters as bars.
function bars(model, logits, temperature, most = 8) {
  const top = Math.max(...logits), cold = Math.max(temperature, 1e-6);
  const p = logits.map(x => Math.exp((x - top) / cold)), sum = p.reduce((a, b) => a + b, 0);
  const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]).slice(0, most);
  return h("ol", { class: "irann-bars", "aria-label": "the likeliest next characters" }, ...order.map(i => {
    const sign = model.characters[i], shown = sign == " " ? "\u2423" : seen(sign);
    const bar = h("li", {}, h("b", { "aria-label": spoken(sign) }, shown), h("i", {}), `${(p[i] / sum * 100).toFixed(1)} %`);
    bar.style.setProperty("--shade", (p[i] / sum).toFixed(4));
    return bar;
  }));
}

// Two buttons, one of which fills all: which was pressed is kept in the link, until anything else is changed.
function fillers(piece, all) {
  let pressed = "";
  piece.controls.fill = { get: () => pressed, set: value => { pressed = value; } };
  piece.box.addEventListener("input", () => { pressed = ""; }, true);
  for (const label of ["fill the gaps", all]) piece.button(label, () => { pressed = label; return piece.changed(); });
}

// Fill the gaps of a text, or write all of it, step by step.
async function fill(piece) {
  const whole = piece.get("fill") != "fill the gaps", { turn } = piece;
  const model = await piece.model(piece.controls.model ? piece.get("model") : undefined), kept = [model.newline], mask = [0];
  if (piece.turn != turn) return;
  const most = Math.min(128, model.config.window);
  piece.encode(model, piece.get("text").replaceAll("_", model.characters[0]), most);
  for (const sign of spelt(piece.get("text"), model.ids)) {
    if (kept.length > most || sign != "_" && !model.ids.has(sign)) continue;
    kept.push(sign == "_" ? model.newline : model.ids.get(sign));
    mask.push(sign == "_" || whole ? 1 : 0);
  }
  if (!mask.includes(1)) return piece.nothing("There is no gap: write _ for each character that is missing.");
  const given = { ids: kept, mask, seed: piece.number("seed"), steps: piece.number("steps"), temperature: 0.8 };
  if (piece.controls.eta) given.eta = piece.number("eta");
  let step = 0;
  await model.ask(piece, "fill", given, part => {
    const signs = part.ids.slice(1).map(id => model.characters[id]);
    const shade = i => mask[i + 1] ? i + 1 < part.settled ? 0.25 : 0.6 : 0;
    piece.out.replaceChildren(row(`step ${++step}`, letters(signs, shade, i => mask[i + 1] ? "written" : "given"), signs.join("")));
    piece.say(`Step ${step}; what is shaded is written, and what is dark may still change.${piece.left}`);
  });
  if (piece.turn != turn) return;
  piece.say(`Written in ${step} steps.${piece.left}`);
}

// ------------------------------------------------------------------------------------------ pieces
const LINE = "To be, or not to be, that is the question";
const READERS = ["gpt", "thinker", "mamba"];
const pieces = {
  cost: {
    build(piece) {
      piece.text("text", "your text", LINE);
      const names = piece.models.filter(name => READERS.includes(name));
      if (piece.box.dataset.counts) names.unshift("counts");
      piece.checks("models", "what each character costs under", names, names.slice(0, 2));
    },
    async update(piece) {
      const names = piece.get("models").split(" ").filter(Boolean), rows = names.map(name => row(name, "", "..."));
      if (!names.length) return piece.nothing("Choose a model.");
      piece.out.replaceChildren(...rows);
      await Promise.all(names.map(async (name, at) => {
        const show = (signs, cost) => {
          const words = !cost.length ? "nothing to read" : `${mean(cost).toFixed(3)} nats per character, ${(mean(cost) / Math.LN2).toFixed(2)} bits`;
          rows[at].replaceChildren(...row(name, priced(signs, cost), words).childNodes);
        };
        if (name == "counts") {
          if (!irannLive.counts) await load("counts");
          const { characters, pairs } = irannLive.counts;
          const typed = spelt(piece.get("text"), new Set(characters)), known = typed.filter(sign => characters.includes(sign)).slice(0, 200);
          const strange = [...new Set(typed.filter(sign => !characters.includes(sign)))];
          if (names.length == 1) {
            const left = strange.length ? ` Left out, for the counts do not know them: ${strange.map(spoken).join(" ")}.` : "";
            piece.say(`The darker a letter, the more nats it cost.${left}`);
          }
          const total = pairs.map(line => line.reduce((a, b) => a + b, 0));
          return show(known, known.map((sign, i) => {
            const before = characters.indexOf(i ? known[i - 1] : "\n"), count = pairs[before][characters.indexOf(sign)];
            return Math.log((total[before] + characters.length) / (count + 1));
          }));
        }
        const model = await piece.model(name), { ids, signs } = piece.encode(model, piece.get("text"), 200);
        await model.ask(piece, "score", { ids, before: model.newline }, part => show(signs, part.cost));
        const v = model.config.vocabulary;
        piece.say(`The darker a letter, the more nats it cost; a blind guess costs log ${v} = ${Math.log(v).toFixed(2)} nats.${piece.left}`);
      }));
    },
  },

  attention: {
    build(piece) {
      piece.text("text", "your line", LINE, 1);
      piece.slider("layer", "layer", 1, 4, 1, 3);
      piece.slider("head", "head", 1, 3, 1, 1);
      piece.position = piece.slider("position", "looking from character", 1, 100, 1, 100);
      piece.slider("temperature", "temperature of the next character", 0.1, 2, 0.05, 1, x => x.toFixed(2));
    },
    async update(piece) {
      const model = await piece.model(), { layers, heads, window } = model.config;
      piece.controls.layer.most(layers);
      piece.controls.head.most(heads);
      piece.keep();
      const read = piece.some(model, piece.get("text"), Math.min(100, window));
      if (!read) return;
      const { ids, signs } = read, key = ids.join();
      const show = () => {
        const t = ids.length, rows = layers * heads;
        const at = Math.min(piece.number("position"), t) - 1, head = (piece.number("layer") - 1) * heads + piece.number("head") - 1;
        const weights = piece.seen.maps.subarray((at * rows + head) * t, (at * rows + head) * t + t);
        const top = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3);
        const pick = i => { piece.controls.position.set(i + 1); piece.changed(); };
        const line = letters(signs, i => weights[i], i => `${spoken(signs[i])}: weight ${weights[i].toFixed(3)}`, { mark: at, pick });
        const words = top.map(i => `${spoken(signs[i])} (${i + 1}) ${(weights[i] * 100).toFixed(0)} %`).join(", ");
        piece.out.replaceChildren(
          row(`from \u201c${spoken(signs[at])}\u201d`, line, "most at " + words),
          bars(model, piece.seen.logits, piece.number("temperature")));
        piece.say(`Layer ${piece.get("layer")}, head ${piece.get("head")}: the darker, the more is looked at. ` +
          `Below: what may come after the line.${piece.left}`);
      };
      if (piece.seenOf == key) return show();
      await model.ask(piece, "attention", { ids }, part => {
        if (piece.position.max == piece.position.value || piece.number("position") > ids.length) piece.controls.position.set(ids.length);
        piece.position.max = ids.length;
        piece.controls.position.set(Math.min(piece.number("position"), ids.length));
        piece.keep();
        Object.assign(piece, { seen: part, seenOf: key });
        show();
      });
    },
  },

  rounds: {
    build(piece) {
      piece.text("text", "your text", LINE);
      piece.slider("threshold", "stop once it is so likely to have stopped", 0, 1, 0.01, 0.5, x => x.toFixed(2));
    },
    async update(piece) {
      const model = await piece.model(), read = piece.some(model, piece.get("text"), 120), most = model.config.rounds;
      if (!read) return;
      const { ids, signs } = read;
      await model.ask(piece, "score", { ids, before: model.newline, threshold: piece.number("threshold") }, part => {
        const done = signs.slice(0, part.cost.length), rounds = part.rounds;
        const shade = i => (rounds[i] - 1) / Math.max(1, most - 1), below = i => rounds[i];
        const line = letters(done, shade, i => `${spoken(signs[i])}: ${rounds[i]} rounds`, { below });
        piece.out.replaceChildren(
          row("rounds", line, `${mean(rounds).toFixed(2)} rounds to guess a character`),
          row("nats", priced(signs, part.cost), `${mean(part.cost).toFixed(3)} nats per character`));
        if (part.done) piece.say(`Under each character: the rounds, at most ${most}, taken to guess it.${piece.left}`);
      });
    },
  },

  denoise: {
    build(piece) {
      piece.text("text", "your text; _ for each character that is to be found", "To be, or ___ to be, that is the ________", 1);
      piece.slider("noise", "noise on the text", 0, 1, 0.01, 0.5, x => x.toFixed(2));
      piece.slider("steps", "steps", 1, 64, 1, 16);
      piece.slider("eta", "fresh noise per step, eta", 0, 1, 0.05, 1, x => x.toFixed(2));
      piece.slider("seed", "seed", 0, 99, 1, 1);
      fillers(piece, "all from noise");
    },
    async update(piece) {
      if (piece.get("fill")) return fill(piece);
      const model = await piece.model(), most = Math.min(64, model.config.window + 1);
      const read = piece.some(model, piece.get("text").replaceAll("_", ""), most);
      if (!read) return;
      const { ids, signs } = read;
      await model.ask(piece, "level", { ids, part: piece.number("noise"), seed: piece.number("seed") }, part => {
        const right = part.guess.filter((id, i) => id == ids[i]).length;
        const [near, guess] = [part.near, part.guess].map(found => found.map(id => model.characters[id]));
        const wrong = i => part.near[i] == ids[i] ? 0 : 0.6, price = i => `${part.cost[i].toFixed(2)} nats for ${spoken(signs[i])}`;
        piece.out.replaceChildren(
          row("nearest", letters(near, wrong, i => `was ${spoken(signs[i])}`), "what the noisy points are nearest to"),
          row("its guess", letters(guess, i => part.cost[i] / 6, price),
            `${right} of ${ids.length} right, ${mean(part.cost).toFixed(2)} nats per character`));
        piece.say(`Noise level ${part.tau} of ${model.config.levels}, without the gaps.${piece.left}`);
      });
    },
  },

  gaps: {
    idle: "Press fill: the weights are loaded then.",
    build(piece) {
      piece.text("text", "your text; _ for each character that is to be found", "What ___ through yonder ______ breaks?", 1);
      piece.choice("model", "who fills", piece.models);
      piece.slider("steps", "steps", 1, 64, 1, 16);
      piece.slider("seed", "seed", 0, 99, 1, 1);
      fillers(piece, "write all anew");
    },
    update(piece) { return piece.get("fill") ? fill(piece) : piece.say(this.idle); },
  },

  forget: {
    build(piece) { piece.text("text", "your text", "ROMEO:\nBut soft, what light through yonder window"); },
    async update(piece) {
      const model = await piece.model(), most = Math.min(120, model.config.window + 1);
      const read = piece.some(model, piece.get("text"), most);
      if (!read) return;
      const { ids, signs } = read, t = ids.length;
      await model.ask(piece, "forget", { ids }, part => {
        const { kept, step } = part, widest = Math.max(...step), { layers } = model.config;
        const strongest = step.indexOf(widest), words = `largest at ${spoken(signs[strongest])} (${strongest + 1}): it rewrites most`;
        piece.out.replaceChildren(
          row("step size", letters(signs, i => step[i] / widest, i => `${spoken(signs[i])}: ${step[i].toFixed(3)}`), words),
          ...Array.from({ length: layers }, (_, layer) => {
            const own = kept.slice(layer * t, layer * t + t), half = own.filter(x => x < 0.5).length;
            const left = i => `${(own[i] * 100).toFixed(0)} % is left`;
            const words = half ? `half is gone after ${t - half} characters` : `even of the first character ${left(0)}`;
            return row(`layer ${layer + 1}`, letters(signs, i => own[i], i => `${spoken(signs[i])}: ${left(i)}`), words);
          }));
        piece.say(`How much of what each character wrote is left in the state at the end: the darker, the more.${piece.left}`);
      });
    },
  },

  write: {
    idle: "Press write: the weights of the models that are chosen are loaded then, about 5 MB each.",
    build(piece) {
      piece.text("text", "the beginning", "ROMEO:\n");
      if (piece.models.length > 1) piece.checks("models", "who writes", piece.models, piece.models);
      piece.slider("temperature", "temperature", 0, 1.5, 0.05, 0.8, x => x.toFixed(2));
      piece.slider("length", "characters", 64, 1024, 64, 256);
      piece.slider("seed", "seed", 0, 99, 1, 1);
      piece.button("write", () => pieces.write.run(piece));
      piece.button("stop", () => { piece.anew(); piece.say("Stopped."); });
    },
    names: piece => piece.models.length > 1 ? piece.get("models").split(" ").filter(Boolean) : piece.models,
    async run(piece) {
      const names = this.names(piece), turn = piece.anew(), failed = [];
      if (!names.length) return piece.nothing("Choose who writes.");
      const panels = names.map(name =>
        h("section", { class: "irann-panel", "aria-label": name }, h("b", {}, name), h("span", { class: "irann-rate" }), h("pre", { dir: "auto", tabindex: 0 })));
      piece.out.replaceChildren(...panels);
      await Promise.all(names.map(async (name, at) => {
        const [, rate, text] = panels[at].children;
        try {
          const model = await piece.model(name);
          if (piece.turn != turn) return;  // stopped while the weights came
          const { ids } = piece.encode(model, piece.get("text"), 1000, "last");
          piece.say("Writing ...");
          const given = { ids: ids.length ? ids : [model.newline], n: piece.number("length"), seed: piece.number("seed") };
          given.temperature = piece.number("temperature");
          await model.ask(piece, "write", given, part => {
            const from = given.ids.length, settled = Math.max(part.settled, from), said = (a, b) => model.decode(part.ids.slice(a, b));
            text.replaceChildren(
              h("span", { class: "irann-given" }, said(0, from)), said(from, settled), h("span", { class: "irann-unsettled" }, said(settled)));
            rate.textContent = `${part.rate.toFixed(0)} characters/s`;
          });
        } catch (error) { failed.push(error.message); text.textContent = `This cannot run here: ${error.message}.`; }
      }));
      if (piece.turn == turn) piece.say(failed.length ? `This cannot run here: ${failed.join("; ")}.` : `Written.${piece.left || ""}`);
    },
  },

  chat: {
    idle: "Say something: the weights are loaded then.",
    build(piece) {
      piece.choice("model", "who answers", piece.models.filter(name => READERS.includes(name)));
      piece.slider("temperature", "temperature", 0, 1.5, 0.05, 0.7, x => x.toFixed(2));
      piece.history = "";
      const line = piece.text("text", "you say", "What news, my lord?", 1);
      line.addEventListener("keydown", event => {
        // while a word is composed, Enter belongs to the word; Safari says so by a number
        if (event.key != "Enter" || event.shiftKey || event.isComposing || event.keyCode == 229) return;
        event.preventDefault();
        if (!event.repeat) piece.attempt(() => pieces.chat.answer(piece));
      });
      piece.button("say it", () => pieces.chat.answer(piece));
      piece.button("begin anew", () => {
        pieces.chat.settle(piece);
        piece.history = "";
        piece.out.replaceChildren();
        piece.say(this.idle);
      });
      piece.out.setAttribute("role", "log");
    },
    // -> the number of the next turn. What was answered by now stays, and is part of the conversation.
    settle(piece) {
      if (piece.answer) piece.history += piece.box.dataset.plain ? piece.answer : piece.answer.trimEnd() + "\n\n";
      piece.answer = "";
      return piece.anew();
    },
    async answer(piece) {
      const { plain } = piece.box.dataset;  // a model of another text goes on with what is said
      const said = plain ? piece.get("text") : piece.get("text").trim();
      if (!said.trim()) return piece.say("Say something first.");
      const turn = this.settle(piece), model = await piece.model(piece.get("model"));
      if (piece.turn != turn) return;
      piece.encode(model, said, Infinity);
      const speech = h("p", { class: "irann-speech", dir: "auto" });
      piece.out.append(h("p", { class: "irann-yours", dir: "auto" }, said), speech);
      piece.history += plain ? said : `FIRST CITIZEN:\n${said}\n\n`;
      const all = model.encode(piece.history).ids, read = all.slice(-400), until = plain ? null : model.encode("\n\n").ids;
      if (all.length > read.length) piece.left += " Only the last 400 characters of the conversation are read.";
      piece.say(`${model.name} writes ...${piece.left}`);
      const ids = read.length ? read : [model.newline];
      const given = { ids, n: 400, temperature: piece.number("temperature"), seed: any(), until };
      await model.ask(piece, "write", given, part => {
        piece.answer = model.decode(part.ids.slice(ids.length));
        speech.textContent = piece.answer.trim();
      });
      if (piece.turn != turn) return;
      this.settle(piece);
      piece.say(`${model.name} has answered.${piece.left}`);
    },
  },
};

// ---------------------------------------------------------------------------------------- the page
// (module (func (result v128) (i32x4.splat (i32.const 0)))): does this browser know vectors?
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 17, 11];
function begin() {
  const able = typeof WebAssembly == "object" && WebAssembly.validate(new Uint8Array(SIMD)) && typeof Worker == "function";
  for (const box of document.querySelectorAll(".irann-live[data-piece]")) {
    if (!able) box.append(h("p", {}, "This browser has no WebAssembly with vectors, which the live piece needs."));
    else if (pieces[box.dataset.piece]) new Piece(box, box.dataset.piece, box.dataset.models.split(" "));
  }
}
if (document.readyState == "loading") document.addEventListener("DOMContentLoaded", begin);
else begin();
})();
