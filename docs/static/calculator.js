// SPDX-License-Identifier: MIT
// The memory calculator: sizes_of, run_of, states, activations and peak of nanopeft/memory.py once more, over its own
// tables (DATA, written by docs/calculator.py). tests/test_docs.py holds every item equal to Python's. Below: the page.
"use strict";

const { MODELS, KEYS, LINEARS, SETTINGS, TRAINED, OWN, TRAINING, PARTS, BYTES, LOSS_CHUNK } = DATA;

class Wrong extends Error {}

function evaluate(formulas, s) {
  const names = Object.keys(s), values = Object.values(s);
  return Object.entries(formulas).map(([what, of]) => {
    const bytes = Math.ceil(new Function("ceil", ...names, `return ${of}`)(Math.ceil, ...values));
    if (!Number.isSafeInteger(bytes)) throw new Wrong("more bytes than can be counted here");
    return [what, of, bytes];
  });
}

const map = (object, f) => Object.fromEntries(Object.entries(object).map(([key, value]) => [key, f(value, key)]));
const total = items => items.reduce((sum, [, , bytes]) => sum + bytes, 0);

function sizesOf(config) {
  const kind = config?.model_type, known = Object.hasOwn(KEYS, kind);
  const tied = known && ("tie_word_embeddings" in config ? config.tie_word_embeddings : kind === "gpt2");
  if (!known || (kind === "gpt2" && !tied) || config.attention_bias || config.mlp_bias)
    throw new Wrong("model_type must be gpt2 with a tied head, or llama without biases");
  const s = { kind, groups: LINEARS[kind] };
  for (const [letter, key] of Object.entries(KEYS[kind])) {
    s[letter] = config[key] ?? { f: 4 * s.d, kv: s.H }[letter];
    if (!Number.isInteger(s[letter]) || s[letter] < 1 || s[letter] > 1 << 24)
      throw new Wrong("not a whole number from 1 to 16777216:", { cause: key });
  }
  if ((config.head_dim || Math.floor(s.d / s.H)) * s.H !== s.d) throw new Wrong("the heads must make the width");
  s.w = kind === "gpt2" ? s.d : Math.floor(s.d / s.H) * s.kv;
  s.linears = Object.assign({}, ...s.groups);
  const biases = kind === "gpt2" ? " + P*d + (2*L + 1)*d + L*(5*d + f)" : "";
  s.Ψ_q = total(evaluate(Object.values(s.linears).map(([i, o]) => `L*${i}*${o}`), s));
  s.Ψ = s.Ψ_q + total(evaluate([`${tied ? 1 : 2}*V*d + (2*L + 1)*d${biases}`], s));
  return s;
}

function runOf(sizes, { method, precision, batch, length, accumulate = 1, recompute = 0, settings = {} }) {
  const given = { ...SETTINGS[method], ...settings }, letters = { rank: "r", bottleneck: "m", tokens: "p" };
  const s = { ...sizes, method, accumulate, B: batch, text: length, e: BYTES[precision] };
  for (const [name, value] of Object.entries(given)) s[letters[name] ?? name] = value;
  s.T = length + (["prompt", "ptuning"].includes(method) && !given.template ? s.p : 0);
  s.every = recompute;
  s.R = recompute ? Math.ceil(s.L / recompute) : 0;
  s.n = s.B * s.T;
  s.m = given.bottleneck || Math.max(1, Math.floor(s.d / 16));
  s.sites = given.placement === "houlsby" ? 2 : 1;
  if (s.T + (method === "prefix" ? s.p : 0) > s.P)
    throw new Wrong("more tokens than the model has positions:", { cause: s.P });
  if ("hidden" in given && !s.hidden)
    s.hidden = method === "prefix" ? 0 : s.encoder === "lstm" ? Math.max(1, Math.floor(s.d / 2)) : s.d;
  const all = Object.keys(s.linears), ends = given.targets === "all-linear" ? all : given.targets ?? [];
  const found = ends.map(end => all.filter(name => `.${name}`.endsWith(`.${end}`)));
  if (found.some(names => !names.length)) throw new Wrong("targets are ends of:", { cause: all.join(", ") });
  s.targets = all.filter(name => found.flat().includes(name));
  const key = method === "ptuning" ? `ptuning, ${s.encoder}` : given.hidden ? "prefix, MLP" : method;
  s.trained = s.targets.map(name => `L*r*(${s.linears[name].join(" + ")})`).join(" + ") || TRAINED[key];
  s.Ψ_t = total(evaluate([s.trained], s));
  return s;
}

function states(s) {
  const full = s.method === "full", sizes = s.targets.map(name => s.linears[name]);
  let model = { "linear layers": "e*Ψ_q", "all other": "e*(Ψ - Ψ_q)" };
  if (s.method === "qlora") {
    const nf4 = (i, o) => `ceil(${i}*${o}/2) + ceil(${i}*${o}/64) + 4*ceil(${i}*${o}/16384) + 4`;
    const quantized = sizes.map(([i, o]) => (s.quant === "nf4" ? nf4(i, o) : `(${i} + 4)*${o}`)).join(" + ");
    const rest = sizes.map(([i, o]) => `${i}*${o}`).join(" + ");
    model = { [`${s.quant} layers`]: `L*(${quantized})`, "all other": `e*(Ψ - L*(${rest}))` };
  }
  if (s.method === "fusion") model["frozen adapters"] = "4*adapters*L*(2*d*m + m + d)";
  if (!full) model.trained = `4*(${s.trained})`;
  const adam = { m: "4*Ψ_t", v: "4*Ψ_t", ...(full && s.e === 2 ? { "master copy": "4*Ψ" } : {}) };
  const formulas = [model, { gradients: full ? "e*Ψ_t" : "4*Ψ_t" }, adam];
  return Object.fromEntries(PARTS.map((part, i) => [part, evaluate(formulas[i], s)]));
}

function activations(s) {
  const full = s.method === "full", gpt2 = s.kind === "gpt2", own = s.method === "adapter" ? s.placement : s.method;
  const places = ["norm", "qkv", "attention", "out", "adapter", "norm 2", "up", "GELU", "down", "adapter 2"];
  const lora = ["qkv", "out", "up", "down"].flatMap((place, i) => Object.entries(s.groups[i])
    .filter(([name]) => s.targets.includes(name)).map(([, sizes]) => [place, ...sizes]));
  const kept = new Set(full ? ["qkv", "out", "up", "down"] : lora.map(([place]) => place));
  const lowest = lora.length ? lora[0][0]
    : { prefix: "qkv", houlsby: "adapter", pfeiffer: "adapter 2", fusion: "adapter 2" }[own];
  const L = Object.fromEntries(places.map((place, i) => [place, i <= places.indexOf(lowest) ? "(L - 1)" : "L"]));
  let formulas = {
    "inputs of norms, and statistics": `(${L["norm"]} + ${L["norm 2"]} + 1)*n*(d + ${gpt2 ? 2 : 1})*e`,
    "outputs of norms": `${kept.has("qkv") + kept.has("up")}*L*n*d*e`,
    "q, k, v, and attention's statistics": `${L.attention}*(n*(d + 2*w)*e + 4*n*H)`,
    "outputs of attention": `${kept.has("out") ? "L" : L.attention}*n*d*e`,
    [gpt2 ? "inputs of GELU" : "gate, SiLU(gate) and up"]: `${L.GELU}*${gpt2 ? "" : "3*"}n*f*e`,
    "inputs of the MLP's last layer": kept.has("down") ? "L*n*f*e" : "0",
    "loss: gradient of its input": "4*B*(T - 1)*d",
    "head's gradient, made in the loss": full ? "4*V*d" : "0",
    "token ids and positions, number of labels": full ? "8*(n + T) + 8" : "8",
    ...OWN[own],
  };
  if (lora.length) {
    formulas["x Aᵀ"] = `${lora.length}*L*n*r*e`;
    const unused = lora.map(([place, i]) => (place === lowest ? ` - r*${i}` : "")).join("");
    formulas["copies in 16 bits"] = `(${s.trained}${unused})*e`;
  }
  if (s.R) {
    for (const what in formulas) formulas[what] = formulas[what].replace(/\bL( - 1)?\b/g, "(L - R)");
    formulas["inputs of recomputed blocks"] = "R*n*d*e";
    if (own === "prefix") formulas["k, v of recomputed blocks, in caches"] = "(R - 1)*2*B*w*(p + T)*e";
  }
  return evaluate(formulas, s).filter(([what, , bytes]) => bytes && (s.e === 2 || what !== "copies in 16 bits"));
}

function peak(s, found) {
  const full = s.method === "full", sums = map(found, items => `${total(items)}`), before = { ...sums };
  const { activations: _, ...states } = sums;
  if (s.accumulate === 1) delete before.gradients;
  const rows = Math.min(Math.max(256, Math.floor((1 << 21) / s.V)), s.B * (s.text - 1));
  Object.assign(s, { rows, chunk: Math.min(rows * s.V, LOSS_CHUNK) });
  const x = s.T > s.text ? "(3*n + 3*rows)*d*e" : "(2*n + 3*rows)*d*e";
  const [one, two] = [1, 2].map(L => total(activations({ ...s, L, R: 0 })));
  const again = { "a block again": `${two - one}`, "freed: the block's input, last norm, loss": "-3*n*d*e" };
  const head = { "gradient of the head": "V*d*e" }, softmax = { "log-softmax in fp32": "chunk*(4 + 4*(e == 2))" };
  const moments = {
    "in the loss": { ...before, logits: "rows*V*e", x, ...(full ? head : softmax) },
    "as backward starts": { ...before, ...(full ? { "gradient of the head": "V*d*(4 + e*(e == 2))" } : {}) },
    "in backward": {
      ...before, ...(s.R && (s.L - 1) % s.every === 0 ? again : {}),
      "both sides of GELU": "2*n*f*e", "residual stream": "n*d*e",
      ...(["adapter", "fusion"].includes(s.method) ? { "freed: inputs of an adapter, last norm": "-2*n*d*e" } : {}),
    },
    "after backward": { ...states, ...(full ? head : {}), input: "n*d*e" },
  };
  return Object.entries(moments).map(([when, parts]) => {
    return evaluate(Object.fromEntries(Object.entries(parts).map(([what, of]) => [`${when}: ${what}`, of])), s);
  }).reduce((most, items) => (total(items) > total(most) ? items : most));
}

// What ZeRO divides, as memory.TRAINING says, is divided; offload moves the optimizer's part to the host.
function stepBytes(config, run) {
  const { devices: N = 1, stage = 0, offload = false } = run, s = { ...runOf(sizesOf(config), run), N };
  const found = map(states(s), (items, part) => TRAINING[`ZeRO ${stage}`][PARTS.indexOf(part)].endsWith("/N")
    ? evaluate(Object.fromEntries(items.map(([what, of]) => [what, `${of}/N`])), s) : items);
  const host = offload ? { offloaded: found.optimizer } : {};
  if (offload) found.optimizer = [];
  found.activations = activations(s);
  return [{ ...found, peak: peak(s, found), ...host }, s];
}

// ------------------------------------------------------------------------------------------------------------ the page

const CHOICES = { quant: ["nf4", "int8"], placement: ["houlsby", "pfeiffer"], encoder: ["lstm", "mlp"] };
const FIELDS = {
  model: [...Object.keys(MODELS), "config.json"], method: Object.keys(SETTINGS), precision: ["bf16", "fp16", "fp32"],
  batch: 1, length: 512, accumulate: 1, recompute: 0, devices: 1, stage: ["0", "1", "2", "3"], offload: false,
};
const say = text => WORDS[document.documentElement.lang.slice(0, 2)][text] ?? text;

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function field(name, value) {
  const list = CHOICES[name] ?? value, number = value === null || typeof value === "number";
  const input = Array.isArray(list) ? element("select", { name }, ...list.map(one => element("option", {}, one)))
    : typeof value === "boolean" ? element("input", { name, type: "checkbox", checked: value })
    : element("input", { name, type: number ? "number" : "text", value: value ?? "", min: Math.min(1, value ?? 1) });
  if (value === null) input.placeholder = say("default");
  return element("label", {}, say(name), input);
}

function read(form) {
  const run = { settings: {} };
  for (const input of form.elements) {
    let value = input.type === "checkbox" ? input.checked : input.value.trim();
    if (input.type === "number") {
      value = value === "" && input.placeholder ? null : Number(value);
      if (value !== null && !(Number.isInteger(value) && value >= input.min && value <= 1 << 20))
        throw new Wrong("not a whole number from 1 to 1048576:", { cause: say(input.name) });
    }
    if (input.name === "targets") value = ["", "all-linear"].includes(value) ? "all-linear" : value.split(/[\s,]+/);
    (input.parentNode.parentNode.className === "own" ? run.settings : run)[input.name] = value;
  }
  return run;
}

function show(run) {
  let config = MODELS[run.model];
  try {
    config ??= JSON.parse(run.config);
  } catch {
    throw new Wrong("not JSON: paste the text of a config.json");
  }
  const [found, s] = stepBytes(config, run), most = total(found.peak);
  const size = bytes => (most < 1e9 ? `${(bytes / 1e6).toFixed(3)} MB` : `${(bytes / 1e9).toFixed(3)} GB`);
  const exact = bytes => bytes.toLocaleString("en"), when = found.peak[0][0].split(": ")[0];
  const short = what => what.replace(`${when}: `, "");
  const bar = (part, bytes) => {
    const color = part === "peak" || !found[part] ? "rest" : part;
    return element("i", { className: color, style: `width: ${Math.max(0, (100 * bytes) / most)}%` });
  };
  const item = part => ([what, of, bytes]) => element("div", { className: "item" },
    element("span", {}, say(short(what))), element("b", {}, size(bytes)),
    element("div", { className: "bar" }, bar(part === "peak" ? short(what) : part, bytes)),
    element("code", {}, part === "peak" && !/[^-\d]/.test(of) ? "" : of), element("small", {}, exact(bytes)));
  const group = ([part, items]) => element("section", {},
    element("h3", {}, bar(part, 0), say(part), element("b", {}, size(total(items)))), ...items.map(item(part)));
  const text = Object.values(found).flat().map(([, of]) => of).join(" ").split(/[^\wΨ]+/);
  const letters = Object.keys(s).filter(key => Number.isInteger(s[key]) && text.includes(key));
  const notes = [s.kind, s.method === "ptuning" && s.encoder, run.stage > 0 && "zero"].map(key => `note: ${key}`);
  return [
    element("p", { className: "most" }, say("peak"), " ", element("b", {}, size(most)), say("at") + say(when)),
    element("div", { className: "bar" }, ...found.peak.map(([what, , bytes]) => bar(short(what), bytes))),
    element("p", { className: "letters" }, letters.map(key => `${key} = ${exact(s[key])}`).join(", ")),
    ...notes.filter(key => say(key) !== key).map(key => element("p", { className: "note" }, say(key))),
    ...Object.entries(found).filter(([, items]) => items.length).map(group),
  ];
}

function start(root) {
  const fields = settings => Object.entries(settings).map(([name, value]) => field(name, value));
  const own = element("div", { className: "own" }), output = element("div", { className: "output" });
  const config = element("textarea", { name: "config", rows: 6, placeholder: '{"model_type": "llama", ...' });
  const form = element("form", {}, ...fields(FIELDS), own, config);
  const { model, method } = form.elements;
  const renew = () => own.replaceChildren(...fields(SETTINGS[method.value]));
  const update = () => {
    config.hidden = model.value !== "config.json";
    try {
      output.replaceChildren(...show(read(form)));
    } catch (error) {
      if (!(error instanceof Wrong)) throw error;
      output.replaceChildren(element("p", { className: "note" }, `${say(error.message)} ${error.cause ?? ""}`));
    }
  };
  [model.value, method.value] = ["gpt2", "lora"];
  method.addEventListener("input", renew);
  form.addEventListener("input", update);
  form.addEventListener("submit", event => event.preventDefault());
  root.replaceChildren(form, output);
  renew();
  update();
}

if (typeof document !== "undefined") start(document.getElementById("calculator"));
