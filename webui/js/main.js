// The page: what is on it, and what happens when it is used.

import { Beginnings } from "./beginnings.js";
import { $, ask, h, setIcon, setText } from "./dom.js";
import { ErrorCards } from "./errors_view.js";
import { Gallery } from "./gallery.js";
import { HeldKeys } from "./held_keys.js";
import { Gamepads } from "./inputs.js";
import { Keeping } from "./keeping.js";
import { MetersView, latencyWords } from "./meters_view.js";
import { Player } from "./player.js";
import { canRecord } from "./recorder.js";
import { RecordingControl } from "./recording_control.js";
import { ServerLink } from "./server_link.js";
import { Remembered, pageStorage, wireValues } from "./settings.js";
import { SettingsForm } from "./settings_form.js";
import { Surroundings } from "./surroundings.js";
import { PromptTimeline } from "./timeline_view.js";
import { socketUrl } from "./wire.js";
import { explainEnd, stateWords } from "./words.js";

const METER_MS = 400;
const MAX_SEED = 2 ** 32;

const store = new Remembered(pageStorage());
const held = new HeldKeys((actions) => {
  for (const pad of document.querySelectorAll(".pad")) pad.classList.toggle("held", actions.includes(pad.dataset.token));
  player.hold(actions);
});
const errors = new ErrorCards($("errors"));
const timeline = new PromptTimeline($("timeline"));
const meters = new MetersView($("meters"), store);
const gamepads = new Gamepads(held);
const beginnings = new Beginnings({ store, errors, onChosen: choosePreset, onPicture: pictureTaken });
const { first } = beginnings;
const gallery = new Gallery($("gallery"), (count) => {
  $("clip-count").textContent = count;
  $("clip-count").hidden = !count;
  $("open-gallery").disabled = !count;
});
const recording = new RecordingControl($("canvas"), {
  onClip: (blob, extension, durationMs) => gallery.addClip(blob, extension, durationMs),
  onFailed: (title, words) => errors.show({ key: "record", title, words, advice: "Pictures can still be kept." }),
});
const form = new SettingsForm($("settings"), store, (values) => {
  beginnings.size = values.size;
  player.playbackMode = values.playback;
});
const server = new ServerLink({ store, onChange: showServer, onModel: useModel, isInside: () => player.isRunning });

const surroundings = new Surroundings({ store, held, isLive: () => player.isLive, onChange: showState });
new Keeping({
  gallery,
  errors,
  canvas: $("canvas"),
  getJournal: () => player.journal,
  getBeginning: async () => ({ base: server.base, hasKey: server.apiKey !== "", init: player.isRunning ? player.init : await initNow() }),
  onReplay: replay,
});

let state = "idle";
let place = null;
let spokenPrompt = "";
let lastMeter = 0;
let preparing = false;

const player = new Player($("canvas"), {
  state: enter,
  queue: (newPlace) => {
    place = newPlace;
    showState();
  },
  drawn: (frame, now) => {
    if (now === player.firstPictureAt) showState();
    timeline.drawn(frame.eventId, now - player.firstPictureAt);
    recording.drawn(now);
  },
  latency: (samples) => {
    const { totalMs, parts } = samples.at(-1);
    $("latency-pill").hidden = false;
    $("latency-text").textContent = `${Math.round(totalMs)} ms`;
    $("latency-pill").title = `From your key to the picture: ${latencyWords(parts)}`;
    meters.latency(player.latency.summary());
  },
  stats: (stats, drawMs) => meters.chunk(stats, drawMs),
  tick,
  skipped: (words) => errors.show({ key: "skipped", title: "A moment was left out", words, advice: "The world goes on.", mild: true }),
  refused: (words) => errors.show({ key: "refused", title: "The server did not take that", words, advice: "The world goes on as before." }),
  over,
});

// --- the world ---

async function begin({ saved = null } = {}) {
  if (preparing) return;
  if (!server.model?.ready) {
    const advice = "Try again when it is ready: its state is shown at the top of the page.";
    errors.show({ key: "session", title: "The server is not ready", words: server.words, advice, actions: [["Try again", () => begin({ saved })]] });
    return;
  }
  preparing = true;
  showState();
  try {
    errors.dismiss("session");
    // Start is there before the first picture is: whoever is quicker than it has chosen it all the same.
    if (!saved) await first.settled();
    if (!saved && !first.exists) {
      errors.show({ key: "session", title: "A picture is needed to begin", advice: "Choose a place, or bring a picture of your own." });
      return;
    }
    const init = saved?.init ?? (await initNow());
    if (!init.prompt) {
      errors.show({ key: "session", title: "Words are needed to begin", advice: "Describe the world in a sentence." });
      $("prompt").focus();
      return;
    }
    await recording.stop();
    meters.clear();
    spokenPrompt = init.prompt;
    timeline.begin(init.prompt);
    beginnings.size = init.size;
    player.start({
      url: socketUrl(server.base, server.apiKey),
      init,
      firstFrameType: saved?.firstFrameType ?? "image/png",
      model: server.model,
      mode: form.values.playback,
      events: saved?.events,
    });
    surroundings.openSheet(false);
    $("stage").focus({ preventScroll: true });
  } finally {
    preparing = false;
    showState();
  }
}

async function initNow() {
  return {
    prompt: $("prompt").value.trim(),
    first_frame: first.exists ? await first.bytes() : null,
    seed: seedValue(),
    ...wireValues(form.fields, form.values),
    // An empty script: the camera is there from the first picture on, with no key held.
    condition_inputs: { camera_actions: [] },
    profile: true,
  };
}

function enter(next) {
  state = next;
  if (next === "connecting") place = null;
  document.body.dataset.state = next === "opening" || next === "waiting" ? "connecting" : next;
  showState();
}

function over(end) {
  held.releaseAll();
  if (document.pointerLockElement) document.exitPointerLock();
  void recording.stop();
  $("stall").hidden = true;
  server.left();
  if (end.normal) return;
  const actions = [["Try again", () => begin()]];
  if (end.wasLive) actions.push(["Go on from the last picture", continueHere]);
  if (!end.wasLive) actions.push(["Server", openServer]);
  errors.show({ key: "session", ...explainEnd(end), actions });
}

function tick(now, stalledMs) {
  gamepads.poll();
  $("stall").hidden = !stalledMs;
  if (stalledMs) setText($("stall"), `Waiting for the server, ${Math.round(stalledMs / 1000)} s`);
  setText($("status"), stalledMs ? "Waiting for the server" : stateWords(state, place));
  if (now - lastMeter < METER_MS) return;
  lastMeter = now;
  meters.update(player.meters(now));
}

function showState() {
  const running = ["connecting", "waiting", "opening"].includes(state);
  const live = state === "live" || state === "paused";
  const words = stateWords(state, place);
  $("state-pill").hidden = !live && state !== "lost" && state !== "ended";
  $("state-text").textContent = words;
  setText($("status"), words);
  if (!live) $("latency-pill").hidden = true;
  for (const id of ["pause", "mouse-look"]) $(id).disabled = !live;
  for (const id of ["screenshot", "first-continue"]) $(id).disabled = !player.hasPicture;
  $("record").disabled = !live;
  $("stop").disabled = !player.isRunning;
  $("restart").disabled = !player.init || running;
  $("save-session").disabled = !player.journal;
  $("pause").querySelector("span").textContent = state === "paused" ? "Go on" : "Pause";
  setIcon($("pause"), state === "paused" ? "play" : "pause");
  $("sticks").hidden = !(live && surroundings.pads === "sticks");
  showStart(running, words);
  showApply();
}

function showStart(running, words) {
  const model = server.model;
  const button = $("start");
  const text = { paused: "Go on", ended: "Step inside again", lost: "Step inside again" }[state] ?? "Step inside";
  button.disabled = running || preparing || (state !== "paused" && !model?.ready);
  $("start-text").textContent = running ? words : preparing ? "One moment" : state === "paused" || model?.ready ? text : server.shortWords;
  setText($("start-note"), !running && model?.ready && model.busy && !player.isRunning ? "Someone is inside now. You will wait in line." : "");
}

// --- words ---

function setWords(words) {
  $("prompt").value = words;
  store.set("prompt", words);
  showApply();
}

function showApply() {
  const words = $("prompt").value.trim();
  $("apply-prompt").hidden = !player.isLive || !words || words === spokenPrompt;
}

function applyPrompt() {
  const words = $("prompt").value.trim();
  if (!player.isLive || !words || words === spokenPrompt) return;
  const eventId = player.say(words);
  if (eventId === null) return;
  spokenPrompt = words;
  timeline.said(words, eventId);
  showApply();
  surroundings.openSheet(false);
}

// --- beginnings ---

async function choosePreset(chosen) {
  if (player.isRunning) {
    $("preset-words").textContent = `“${chosen.name}” can begin as a new world with its picture, or only its words can change this one.`;
    const answer = await ask($("preset-dialog"));
    if (answer !== "restart" && answer !== "prompt") return;
    setWords(chosen.prompt);
    if (answer === "prompt") return applyPrompt();
    await beginnings.usePreset(chosen);
    return begin();
  }
  setWords(chosen.prompt);
  await beginnings.usePreset(chosen);
  if (state === "ended" || state === "lost") enter("idle");
}

function pictureTaken() {
  if (player.isRunning) beginnings.hint("It is used when you restart.");
  else if (state !== "idle") enter("idle");
}

async function continueHere() {
  await beginnings.usePicture($("canvas"));
  await begin();
}

async function useModel(model) {
  form.build(model);
  beginnings.size = form.values.size;
  const preset = beginnings.offer(model);
  if (!preset) return;
  // The words first: while the picture loads, somebody may be typing already.
  $("prompt").value = store.get("prompt", preset.prompt);
  await beginnings.usePreset(preset);
}

function seedValue() {
  const seed = Math.floor(Number($("seed").value));
  return Number.isSafeInteger(seed) && seed >= 0 ? seed : 42;
}

function setSeed(seed) {
  $("seed").value = seed;
  store.set("seed", seed);
}

// --- server ---

function showServer() {
  const chip = $("server-chip");
  chip.dataset.tone = server.tone;
  $("server-chip-text").textContent = server.words;
  const model = server.model;
  const facts = model ? [["World model", model.id], ["Runs on", model.device || "unknown"], ["State", server.words], ["Picture", model.defaultSize.replace("x", " × ")]] : [["State", server.words]];
  facts.unshift(["Address", server.base]);
  $("server-facts").replaceChildren(...facts.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]));
  showState();
}

async function openServer() {
  $("server-address").value = server.typed;
  $("server-key").value = server.apiKey;
  if ((await ask($("server-dialog"))) !== "save") return;
  try {
    server.use($("server-address").value, $("server-key").value);
    errors.dismiss("server");
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    errors.show({ key: "server", title: "This is not an address", words: $("server-address").value, advice: "Enter a host and a port, for example 127.0.0.1:30000." });
  }
}

// --- keep ---

async function replay(saved) {
  if (saved.model !== server.model?.id)
    errors.show({ key: "replay", mild: true, title: "Another model made this session", words: saved.model, advice: "It plays here, but the world will look different." });
  await first.use(new Blob([saved.init.first_frame], { type: saved.firstFrameType }));
  setWords(saved.init.prompt);
  setSeed(saved.init.seed);
  form.set(saved.init);
  await begin({ saved });
}

// --- the page around it ---

async function toggleMeters() {
  const wanted = !meters.isOpen;
  $("toggle-meters").setAttribute("aria-pressed", String(wanted));
  store.set("meters", wanted);
  await meters.open(wanted);
}

function wireControls() {
  $("start").onclick = () => (state === "paused" ? player.pause(false) : begin());
  $("pause").onclick = () => player.pause(state !== "paused");
  $("restart").onclick = () => begin();
  $("stop").onclick = () => player.stop();
  $("record").onclick = () => recording.toggle();
  $("record").hidden = !canRecord();
  $("toggle-meters").onclick = toggleMeters;
  $("latency-pill").onclick = toggleMeters;
  $("prompt").oninput = () => {
    store.set("prompt", $("prompt").value);
    showApply();
  };
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (player.isLive ? applyPrompt : begin)();
  };
  $("apply-prompt").onclick = applyPrompt;
  $("first-continue").onclick = continueHere;
  setSeed(store.get("seed", 42));
  $("seed").onchange = () => setSeed(seedValue());
  $("dice").onclick = () => setSeed(Math.floor(Math.random() * MAX_SEED));
  $("reset-settings").onclick = () => form.reset();
  $("server-chip").onclick = openServer;
}

async function boot() {
  wireControls();
  if (store.get("meters", false)) await toggleMeters();
  await beginnings.load();
  server.begin();
}

await boot();
