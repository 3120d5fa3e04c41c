// The page: what is on it, and what happens when it is used.

import { ACTIONS, LOOK, MOVE, defaultBindings } from "./bindings.js";
import { $, ask, download, h, isTyping, setIcon, stamp } from "./dom.js";
import { ErrorCards } from "./errors_view.js";
import { FirstPicture } from "./first_picture.js";
import { Gallery } from "./gallery.js";
import { HeldKeys } from "./held_keys.js";
import { HelpView } from "./help_view.js";
import { Gamepads, MouseLook, listenToKeyboard, padButton, releaseWhenInattentive, touchStick } from "./inputs.js";
import { JournalError, parseJournal } from "./journal.js";
import { MetersView, latencyWords } from "./meters_view.js";
import { canvasBytes } from "./picture.js";
import { listenForPictures, takeFromCamera } from "./picture_sources.js";
import { Player } from "./player.js";
import { loadCatalog, markPreset, presetButtons, presetPicture, presetsFor } from "./presets.js";
import { canRecord } from "./recorder.js";
import { RecordingControl } from "./recording_control.js";
import { parseSize } from "./server_info.js";
import { ServerLink } from "./server_link.js";
import { Remembered, pageStorage, wireValues } from "./settings.js";
import { SettingsForm } from "./settings_form.js";
import { pythonSnippet } from "./snippet.js";
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
const first = new FirstPicture({
  preview: $("first-preview"),
  poster: $("poster"),
  onChange: ({ cropped }) => ($("first-hint").textContent = cropped ? "Drag the picture to choose its part." : "Drop or paste a picture anywhere."),
});
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
  setShape(values.size);
  player.playbackMode = values.playback;
});
const server = new ServerLink({ store, onChange: showServer, onModel: useModel });

let catalog = [];
let preset = null;
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
    setShape(init.size);
    player.start({
      url: socketUrl(server.base, server.apiKey),
      init,
      firstFrameType: saved?.firstFrameType ?? "image/png",
      model: server.model,
      mode: form.values.playback,
      events: saved?.events,
    });
    closeSheet();
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

/** The same beginning again: words, picture and seed of the session that was. */
function again() {
  void begin({ saved: { init: player.init, firstFrameType: "image/png" } });
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
  server.askNow();
  if (end.normal) return;
  const actions = [["Try again", player.init ? again : begin]];
  if (end.wasLive) actions.push(["Go on from the last picture", continueHere]);
  if (!end.wasLive) actions.push(["Server", openServer]);
  errors.show({ key: "session", ...explainEnd(end), actions });
}

function tick(now, stalledMs) {
  gamepads.poll();
  $("stall").hidden = !stalledMs;
  if (stalledMs) $("stall").textContent = `Waiting for the server, ${Math.round(stalledMs / 1000)} s`;
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
  $("status").textContent = words;
  if (!live) $("latency-pill").hidden = true;
  for (const id of ["pause", "mouse-look"]) $(id).disabled = !live;
  for (const id of ["screenshot", "first-continue"]) $(id).disabled = !player.hasPicture;
  $("record").disabled = !live;
  $("stop").disabled = !player.isRunning;
  $("restart").disabled = !player.init || running;
  $("save-session").disabled = !player.journal;
  $("pause").querySelector("span").textContent = state === "paused" ? "Go on" : "Pause";
  setIcon($("pause"), state === "paused" ? "play" : "pause");
  $("sticks").hidden = !(live && padsMode() === "sticks");
  showStart(running, words);
  showApply();
}

function showStart(running, words) {
  const model = server.model;
  const button = $("start");
  const text = { paused: "Go on", ended: "Step inside again", lost: "Step inside again" }[state] ?? "Step inside";
  button.disabled = running || preparing || (state !== "paused" && !model?.ready);
  $("start-text").textContent = running ? words : preparing ? "One moment" : state === "paused" || model?.ready ? text : server.shortWords;
  $("start-note").textContent = !running && model?.ready && model.busy && !player.isRunning ? "Someone is inside now. You will wait in line." : "";
}

// --- words ---

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
  closeSheet();
}

// --- beginnings ---

async function choosePreset(chosen) {
  if (player.isRunning) {
    $("preset-words").textContent = `“${chosen.name}” can begin as a new world with its picture, or only its words can change this one.`;
    const answer = await ask($("preset-dialog"));
    if (answer !== "restart" && answer !== "prompt") return;
    $("prompt").value = chosen.prompt;
    if (answer === "prompt") return applyPrompt();
    await usePreset(chosen);
    return begin();
  }
  await usePreset(chosen);
  if (state === "ended" || state === "lost") enter("idle");
}

async function usePreset(chosen) {
  $("prompt").value = chosen.prompt;
  store.set("prompt", chosen.prompt);
  showApply();
  await usePresetPicture(chosen);
}

async function usePresetPicture(chosen) {
  try {
    if (!(await first.use(presetPicture(chosen)))) return;
  } catch (error) {
    const advice = "Choose it again, or bring a picture of your own.";
    errors.show({ key: "picture", title: `The picture of “${chosen.name}” could not be loaded`, words: error.message, advice });
    return;
  }
  errors.dismiss("picture");
  preset = chosen;
  store.set("preset", chosen.id);
  markPreset($("presets"), chosen.id);
}

async function usePicture(source) {
  try {
    if (!(await first.use(source))) return;
  } catch (error) {
    if (error.name !== "InvalidStateError") throw error;
    errors.show({ key: "picture", title: "This file is not a picture the browser can read", advice: "Choose a JPEG, PNG or WebP file." });
    return;
  }
  errors.dismiss("picture");
  preset = null;
  markPreset($("presets"), null);
  if (player.isRunning) $("first-hint").textContent = "It is used when you restart.";
  else if (state !== "idle") enter("idle");
}

async function continueHere() {
  await usePicture($("canvas"));
  await begin();
}

async function useModel(model) {
  form.build(model);
  setShape(form.values.size);
  const presets = presetsFor(catalog, model.id);
  $("presets").replaceChildren(...presetButtons(presets, choosePreset));
  if (first.isChosen) return markPreset($("presets"), preset?.id ?? null);
  const remembered = presets.find(({ id }) => id === store.get("preset")) ?? presets[0];
  // The words first: while the picture loads, somebody may be typing already.
  $("prompt").value = store.get("prompt", remembered.prompt);
  await usePresetPicture(remembered);
}

function setShape(size) {
  const { width, height } = parseSize(size);
  document.documentElement.style.setProperty("--aspect", String(width / height));
  first.target = { width, height };
}

function seedValue() {
  const seed = Math.floor(Number($("seed").value));
  return Number.isSafeInteger(seed) && seed >= 0 ? seed : 42;
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

async function keepPicture() {
  gallery.addPicture(new Blob([await canvasBytes($("canvas"))], { type: "image/png" }));
}

function saveSession() {
  download(new Blob([JSON.stringify(player.journal, null, 1)], { type: "application/json" }), `world-${stamp()}.json`);
}

async function replayFile(file) {
  try {
    const saved = parseJournal(await file.text());
    if (saved.model !== server.model?.id)
      errors.show({ key: "replay", mild: true, title: "Another model made this session", words: saved.model, advice: "It plays here, but the world will look different." });
    await first.use(new Blob([saved.init.first_frame], { type: saved.firstFrameType }));
    $("prompt").value = saved.init.prompt;
    await begin({ saved });
  } catch (error) {
    if (!(error instanceof JournalError) && error.name !== "InvalidStateError") throw error;
    errors.show({ key: "replay", title: "This session cannot be replayed", words: error.message, advice: "Choose a file that was saved here." });
  }
}

async function openSnippet() {
  const init = player.init ?? (await initNow());
  $("snippet").textContent = pythonSnippet(server.base, init);
  $("snippet-picture").onclick = () => download(new Blob([init.first_frame], { type: "image/png" }), "first_frame.png");
  $("snippet-dialog").showModal();
}

// --- the page around it ---

const padsMode = () => store.get("pads", matchMedia("(pointer: coarse)").matches ? "sticks" : "keys");

function setPads(mode) {
  store.set("pads", mode);
  document.body.dataset.pads = mode;
  showState();
}

function closeSheet() {
  delete document.body.dataset.sheet;
  $("open-sheet").setAttribute("aria-expanded", "false");
}

function toggleTheatre() {
  const wanted = document.body.toggleAttribute("data-theatre");
  $("theatre").setAttribute("aria-pressed", String(wanted));
}

function toggleFullscreen() {
  if (document.fullscreenElement) void document.exitFullscreen();
  else void document.querySelector(".world").requestFullscreen();
}

async function toggleMeters() {
  const wanted = !meters.isOpen;
  $("toggle-meters").setAttribute("aria-pressed", String(wanted));
  store.set("meters", wanted);
  await meters.open(wanted);
}

const SHORTCUTS = {
  Space: () => $("pause").click(),
  KeyF: () => $("fullscreen").click(),
  KeyT: toggleTheatre,
  KeyR: () => $("record").click(),
  KeyP: () => $("screenshot").click(),
};

function wireControls() {
  $("start").onclick = () => (state === "paused" ? player.pause(false) : begin());
  $("pause").onclick = () => player.pause(state !== "paused");
  $("restart").onclick = again;
  $("stop").onclick = () => player.stop();
  $("record").onclick = () => recording.toggle();
  $("record").hidden = !canRecord();
  $("screenshot").onclick = keepPicture;
  $("open-gallery").onclick = () => $("gallery-dialog").showModal();
  $("toggle-meters").onclick = toggleMeters;
  $("latency-pill").onclick = toggleMeters;
  $("theatre").onclick = toggleTheatre;
  $("fullscreen").onclick = toggleFullscreen;
  $("fullscreen").hidden = !document.fullscreenEnabled;
  $("prompt").oninput = () => {
    store.set("prompt", $("prompt").value);
    showApply();
  };
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (player.isLive ? applyPrompt : begin)();
  };
  $("apply-prompt").onclick = applyPrompt;
  $("first-file").onchange = ({ target }) => {
    if (target.files[0]) void usePicture(target.files[0]);
    target.value = "";
  };
  $("first-camera").onclick = () => takeFromCamera({
    onPicture: usePicture,
    onRefused: (words) => errors.show({ key: "camera", title: "The camera cannot be used", words, advice: "Allow it for this page, or choose a file." }),
  });
  $("first-camera").hidden = !navigator.mediaDevices?.getUserMedia;
  $("first-continue").onclick = continueHere;
  $("seed").value = store.get("seed", 42);
  $("seed").onchange = () => store.set("seed", ($("seed").value = seedValue()));
  $("dice").onclick = () => store.set("seed", ($("seed").value = Math.floor(Math.random() * MAX_SEED)));
  $("reset-settings").onclick = () => form.reset();
  $("save-session").onclick = saveSession;
  $("load-session").onchange = ({ target }) => {
    if (target.files[0]) void replayFile(target.files[0]);
    target.value = "";
  };
  $("open-snippet").onclick = openSnippet;
  $("snippet-copy").onclick = async () => {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("snippet-copy").querySelector("span").textContent = "Copied";
    setTimeout(() => ($("snippet-copy").querySelector("span").textContent = "Copy"), 2000);
  };
  $("snippet-copy").hidden = !navigator.clipboard;
  $("server-chip").onclick = openServer;
  $("open-sheet").onclick = () => {
    document.body.dataset.sheet = "";
    $("open-sheet").setAttribute("aria-expanded", "true");
  };
  $("close-sheet").onclick = closeSheet;
}

function wireInputs() {
  const bindings = () => store.get("bindings", null) ?? defaultBindings();
  listenToKeyboard(held, { bindings, isActive: () => player.isLive });
  releaseWhenInattentive(held);
  for (const [root, tokens] of [["pads-move", "wasd"], ["pads-look", "ijkl"]])
    for (const token of tokens) {
      const { label, icon } = ACTIONS.find((action) => action.token === token);
      const button = h("button", { className: "pad", "data-token": token, "aria-label": label, title: label, textContent: icon });
      padButton(button, held, token);
      $(root).append(button);
    }
  touchStick($("stick-move"), held, MOVE);
  touchStick($("stick-look"), held, LOOK);
  const mouse = new MouseLook(held, $("stage"), (on) => $("mouse-look").setAttribute("aria-pressed", String(on)));
  $("mouse-look").onclick = () => mouse.toggle();
  $("mouse-look").hidden = !MouseLook.exists;
  const help = new HelpView($("help-body"), {
    getBindings: bindings,
    setBindings: (next) => store.set("bindings", next),
    pads: { value: padsMode, options: [["keys", "Keys"], ["sticks", "Sticks"], ["none", "Nothing"]], choose: setPads },
  });
  const openHelp = () => {
    help.draw();
    if (!$("help-dialog").open) $("help-dialog").showModal();
  };
  $("open-help").onclick = openHelp;
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (isTyping(event.target) || document.querySelector("dialog[open]")) return;
    if (event.key === "?") return openHelp();
    if (event.code === "Escape") return closeSheet();
    if (event.code === "Space" && event.target.closest("button, summary, label")) return;
    const run = SHORTCUTS[event.code];
    if (!run) return;
    event.preventDefault();
    run();
  });
}

async function boot() {
  wireControls();
  wireInputs();
  listenForPictures(usePicture);
  setPads(padsMode());
  if (store.get("meters", false)) await toggleMeters();
  catalog = await loadCatalog();
  server.begin();
}

await boot();
