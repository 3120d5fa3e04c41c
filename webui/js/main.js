// The page: creates its parts, connects them, and handles its controls.

import { chosenBindings } from "./bindings.js";
import { $, ask, closeButtons, setIcon, setText } from "./dom.js";
import { EndCard } from "./end_card.js";
import { ErrorCards } from "./errors_view.js";
import { ExportMenu } from "./export.js";
import { Gallery } from "./gallery.js";
import { HeldKeys } from "./held_keys.js";
import { Gamepads, showHeldPads } from "./inputs.js";
import { KeptWorld } from "./kept_world.js";
import { LatencyPill } from "./latency_pill.js";
import { Layout } from "./layout.js";
import { LineView } from "./line_view.js";
import { builtinText, coldSizeText, inUseText, stateText, warmUpText } from "./messages.js";
import { MetersView } from "./meters_view.js";
import { Player } from "./player.js";
import { PromptField } from "./prompt_field.js";
import { MeasuredRates } from "./rates.js";
import { RecordButton } from "./record_button.js";
import { SeedField } from "./seed_field.js";
import { Server } from "./server.js";
import { ServerForm } from "./server_form.js";
import { showServerFacts } from "./server_view.js";
import { SettingsStore, browserStorage, wireValues } from "./settings.js";
import { SettingsForm } from "./settings_form.js";
import { StartForm } from "./start_form.js";
import { StartView } from "./start_view.js";
import { PromptTimeline } from "./timeline_view.js";
import { canRecord } from "./video_recorder.js";
import { socketUrl } from "./wire.js";
import { focusWorld, keepKeyboardOnWorld } from "./world_focus.js";

const METERS_INTERVAL_MS = 400;
const OPENING = ["connecting", "waiting", "opening", "warming"];

const store = new SettingsStore(browserStorage());
const held = new HeldKeys((actions) => {
  showHeldPads(actions);
  player.hold(actions);
});
const errors = new ErrorCards($("errors"));
const timeline = new PromptTimeline($("timeline"));
const meters = new MetersView($("meters"), store);
const latencyPill = new LatencyPill({ meters, store, getPlayer: () => player });
const gamepads = new Gamepads(held);
const prompt = new PromptField({
  store,
  getLimit: () => server.model?.maxPromptCharacters ?? Infinity,
  onChange: showApplyPrompt,
});
const seed = new SeedField({ store, onChange: showLaterChanges });
const startForm = new StartForm({ store, errors, onPreset: choosePreset, onImage: imageChosen });
const { firstFrame } = startForm;
const gallery = new Gallery($("gallery"), (count) => {
  $("clip-count").textContent = count;
  $("clip-count").hidden = !count;
  $("open-gallery").disabled = !count;
});
const recording = new RecordButton($("canvas"), {
  onClip: (blob, extension, durationMs) => gallery.addClip(blob, extension, durationMs),
  onFailed: (title, detail) => errors.show({ key: "record", title, detail, advice: "Screenshots still work." }),
});
const form = new SettingsForm($("settings"), store, (values) => {
  // A running session keeps its size.
  if (!player.isRunning) startForm.size = values.size;
  player.playbackMode = values.playback;
  showState();
});
const rates = new MeasuredRates(store);
const server = new Server({
  store,
  onChange: showServer,
  onModel: useModel,
  isOurs: () => player.isRunning && holdsServer,
});
const endCard = new EndCard(errors, server);
const startView = new StartView(server);
const serverForm = new ServerForm($("server-form"), server, () => $("server-dialog").close());

const layout = new Layout({ store, held, isLive: keysSteer, onChange: showState });
new ExportMenu({
  gallery,
  errors,
  canvas: $("canvas"),
  getLog: () => player.log,
  getSnippetInput: async () => ({
    base: server.base ?? server.address,
    hasKey: server.apiKey !== "",
    init: player.isRunning ? player.init : await initFromPage(),
  }),
  onReplay: replay,
});

let state = "idle";
let holdsServer = false; // the session is, or was until it ended, the one that the server runs
let queuePosition = null;
let warmUp = null; // what the server prepares before the session opens
let sentPrompt = "";
let metersShownAt = 0;
let isStarting = false; // between the click on Start and the connection

const line = new LineView(() => {
  player.stop();
  enter("idle");
});
const player = new Player($("canvas"), {
  state: enter,
  queue: (position, waitedMs) => {
    queuePosition = position;
    if (position > 0) line.show(position, waitedMs);
    showState();
  },
  warming: (said) => {
    warmUp = said;
  },
  drawn: (frame, now) => {
    if (now === player.firstDrawnAt) showState();
    timeline.frameDrawn(frame.eventId, now - player.firstDrawnAt);
    kept.frameDrawn(frame, timeline.prompt);
    recording.frameDrawn(now);
  },
  latency: (samples) => latencyPill.measured(samples),
  stats: (stats, drawMs) => {
    meters.chunk(stats, drawMs);
    rates.chunkCame(stats);
    kept.chunkCame(stats);
  },
  tick,
  skipped: (detail) =>
    errors.show({
      key: "skipped",
      title: "Some frames were skipped",
      detail,
      advice: "The session continues.",
      minor: true,
    }),
  refused: (detail, event) => {
    kept.notDone(event);
    errors.show({
      key: "refused",
      title: "The server refused the last change",
      detail,
      advice: "The session continues unchanged.",
    });
  },
  dropped: (event) => kept.notDone(event),
  opened: (ticket) => kept.opened(ticket),
  rewound: wentBack,
  world: (bytes) => kept.worldCame(bytes),
  ended: sessionEnded,
});
const kept = new KeptWorld({
  player,
  errors,
  canvas: $("canvas"),
  getBase: () => server.base,
  onOpen: openWorld,
  onStop: () => player.stop(),
});

// --- the session ---

/** Keys are held from the start on: what is pressed before the first frame walks with it. */
function keysSteer() {
  return player.isRunning ? !player.isReplay : isStarting;
}

async function start({ saved = null, world = null } = {}) {
  const given = saved ?? world;
  if (isStarting) return;
  if (!server.model?.ready) {
    endCard.notReady(() => start({ saved, world }));
    return;
  }
  if (!given && !prompt.check()) return;
  isStarting = true;
  showState();
  try {
    endCard.dismiss();
    // The user may click Start while the first frame is still loading.
    if (!given) await firstFrame.settled();
    if (!given && !firstFrame.exists) {
      endCard.show({ title: "A first frame is needed", advice: "Choose a preset, or use an image of your own." });
      return;
    }
    if (!given) startForm.size = form.values.size;
    const init = given?.init ?? (await initFromPage());
    if (!init.prompt) {
      endCard.show({ title: "A prompt is needed", advice: "Describe the world in a sentence." });
      prompt.focus();
      return;
    }
    await recording.stop();
    meters.clear();
    showSession(init);
    rates.sessionStarts(server.base, server.model, init);
    player.start({
      url: socketUrl(server.base, server.apiKey),
      init,
      firstFrameType: saved?.firstFrameType ?? "image/png",
      model: server.model,
      mode: form.values.playback,
      saved,
      world: world?.bytes,
    });
    layout.openSheet(false);
    focusWorld();
  } finally {
    isStarting = false;
    showState();
  }
}

function showSession(init) {
  sentPrompt = init.prompt;
  timeline.start(init.prompt);
  kept.start(init);
  startForm.size = init.size;
}

/** Goes on with the session that this page had before it was loaded again. */
function resumeAfterReload() {
  const ticket = kept.takeTicket();
  if (!ticket || player.isRunning || isStarting) return;
  showSession(ticket.init);
  player.resume({ ...ticket, url: socketUrl(server.base, server.apiKey), mode: form.values.playback });
  void kept.showPicture(ticket);
}

function wentBack(place) {
  const inForce = kept.rewound(place) ?? timeline.prompt;
  sentPrompt = inForce;
  timeline.wentBack(inForce, performance.now() - player.firstDrawnAt);
  showApplyPrompt();
}

async function openWorld({ bytes, init, firstFrame: { data, width, height } }) {
  await firstFrame.use(new ImageData(data, width, height));
  prompt.value = init.prompt;
  seed.value = init.seed ?? seed.value;
  form.set(init);
  await start({ world: { bytes, init: { ...init, ...wireValues(form.fields, form.values) } } });
}

async function initFromPage() {
  return {
    prompt: prompt.value,
    first_frame: firstFrame.exists ? await firstFrame.bytes() : null,
    seed: seed.value,
    ...wireValues(form.fields, form.values),
    // An empty script: camera control is on from the first frame, with no key held.
    condition_inputs: { camera_actions: [] },
    profile: true,
  };
}

function enter(next) {
  state = next;
  if (["opening", "warming", "live"].includes(next)) holdsServer = true;
  else if (["idle", "connecting", "waiting"].includes(next)) holdsServer = false;
  if (next !== "waiting") line.hide();
  kept.showAway(next === "away");
  if (next === "connecting") queuePosition = null;
  if (next === "idle") startForm.size = form.values.size;
  document.body.dataset.state = OPENING.includes(next) ? "connecting" : next;
  showState();
}

async function sessionEnded(end) {
  held.releaseAll();
  kept.ended();
  if (document.pointerLockElement) document.exitPointerLock();
  void recording.stop();
  $("stall").hidden = true;
  server.sessionEnded(holdsServer);
  if (end.normal) return;
  const isBlocked = !end.hasOpened && (await server.answers());
  if (player.isRunning) return; // the user was faster
  const actions = [["Try again", () => start()]];
  if (end.wasLive) actions.push(["Start from the last frame", startFromLastFrame]);
  if (!end.wasLive) actions.push(["Server", openServer]);
  endCard.ended({ ...end, isBlocked }, actions);
}

function tick(now, stalledMs) {
  gamepads.poll();
  $("stall").hidden = !stalledMs;
  if (stalledMs) setText($("stall"), `Waiting for the server, ${Math.round(stalledMs / 1000)} s`);
  setText($("status"), stalledMs ? "Waiting for the server" : stateText(state, queuePosition, player.isReplay));
  if (now - metersShownAt < METERS_INTERVAL_MS) return;
  metersShownAt = now;
  meters.update(player.meters(now));
}

function showState() {
  const isOpening = OPENING.includes(state);
  const isLive = state === "live" || state === "paused";
  const text = stateText(state, queuePosition, player.isReplay);
  document.body.toggleAttribute("data-replay", isLive && player.isReplay);
  $("state-pill").hidden = !isLive && !["away", "lost", "ended"].includes(state);
  $("state-text").textContent = text;
  setText($("status"), text);
  latencyPill.show();
  for (const id of ["pause", "mouse-look"]) $(id).disabled = !isLive;
  for (const id of ["screenshot", "first-continue"]) $(id).disabled = !player.hasDrawn;
  $("record").disabled = !isLive;
  $("stop").disabled = !player.isRunning;
  $("restart").disabled = !player.init || isOpening;
  $("save-session").disabled = !player.log;
  $("pause").querySelector("span").textContent = state === "paused" ? "Resume" : "Pause";
  setIcon($("pause"), state === "paused" ? "play" : "pause");
  $("sticks").hidden = !(isLive && layout.pads === "sticks");
  startView.show({
    state,
    isRunning: player.isRunning,
    progress: isOpening ? text : "",
    isLoading: isStarting,
    note: startNote(),
    keys: layout.pads === "sticks" ? null : chosenBindings(store),
  });
  showLaterChanges();
  showApplyPrompt();
}

function startNote() {
  const { model } = server;
  if (!model?.ready || !form.model) return "";
  if (state === "warming") return warmUpText(warmUp);
  const speed = server.isInUse ? inUseText(model) : rates.note(server.base, model, wireValues(form.fields, form.values));
  const { size } = form.values;
  const before = player.isRunning ? [] : [builtinText(model, size), coldSizeText(model, size)];
  return [...before, speed].filter(Boolean).join(" ");
}

/** Says of each setting that was changed during a session that it waits for the next one. */
function showLaterChanges() {
  const next = player.isRunning ? { ...wireValues(form.fields, form.values), seed: seed.value } : null;
  const isLater = (key) => next !== null && (next[key] ?? null) !== (player.init[key] ?? null);
  form.markLater(isLater);
  seed.isLater = isLater("seed");
}

/** A key that no field wants. Returns whether it started or resumed the world. */
function keyStarts(code) {
  if (state === "paused" && code === "Enter") {
    player.pause(false);
    return true;
  }
  // Walking on when a session has just ended must not start the next one.
  const walks = state === "idle" && chosenBindings(store).w.includes(code);
  const isStart = code === "Enter" || code === "Space" || walks;
  if (!isStart || player.isRunning || isStarting || !server.model?.ready) return false;
  void start();
  return true;
}

// --- prompt ---

function canApplyPrompt() {
  return player.isLive && !player.isReplay && prompt.value !== "" && prompt.value !== sentPrompt;
}

function showApplyPrompt() {
  prompt.show(canApplyPrompt());
}

function applyPrompt() {
  if (!canApplyPrompt() || !prompt.check()) return;
  const text = prompt.value;
  const eventId = player.sendPrompt(text);
  if (eventId === null) return;
  sentPrompt = text;
  timeline.promptSent(text, eventId);
  showApplyPrompt();
  focusWorld();
  layout.openSheet(false);
}

// --- presets and the first frame ---

async function choosePreset(chosen) {
  if (player.isRunning) {
    $("preset-text").textContent =
      `Start a new session from the preset “${chosen.name}”, or send only its prompt to this session.`;
    $("preset-dialog").querySelector("[value=prompt]").hidden = player.isReplay;
    const answer = await ask($("preset-dialog"));
    if (answer !== "restart" && answer !== "prompt") return;
    prompt.value = chosen.prompt;
    if (answer === "prompt") return applyPrompt();
    await startForm.usePreset(chosen);
    return start();
  }
  prompt.value = chosen.prompt;
  await startForm.usePreset(chosen);
  if (state === "ended" || state === "lost") enter("idle");
}

function imageChosen() {
  if (player.isRunning) startForm.hint("This image applies at the next start.");
  else if (state !== "idle") enter("idle");
}

async function startFromLastFrame() {
  await startForm.useImage($("canvas"));
  await start();
}

async function useModel(model) {
  form.build(model);
  $("advanced").hidden = false;
  if (!player.isRunning) startForm.size = form.values.size;
  resumeAfterReload();
  showState();
  await proposePreset(model.id);
}

async function proposePreset(modelId) {
  const preset = startForm.showPresets(modelId);
  if (!preset) return;
  // The prompt first: the user may already type while the image loads.
  prompt.propose(preset.prompt);
  await startForm.usePreset(preset, { isChosen: false });
}

// --- server ---

function showServer() {
  showServerFacts(server);
  endCard.serverChanged();
  showState();
}

function openServer() {
  serverForm.fill();
  $("server-dialog").showModal();
}

// --- replay ---

async function replay(saved) {
  if (saved.model !== server.model?.id)
    errors.show({
      key: "replay",
      minor: true,
      title: "This session was made with another model",
      detail: saved.model,
      advice: "It plays here, but it will look different.",
    });
  await firstFrame.use(new Blob([saved.init.first_frame], { type: saved.firstFrameType }));
  prompt.value = saved.init.prompt;
  seed.value = saved.init.seed ?? seed.value;
  form.set(saved.init);
  await start({ saved });
}

// --- controls ---

function connectControls() {
  closeButtons();
  showHeldPads([]);
  $("start").onclick = () => (state === "paused" ? player.pause(false) : start());
  $("pause").onclick = () => player.pause(state !== "paused");
  $("restart").onclick = () => start();
  $("stop").onclick = () => player.stop();
  $("record").onclick = () => recording.toggle();
  $("record").hidden = !canRecord();
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (player.isLive ? applyPrompt : start)();
  };
  $("apply-prompt").onclick = applyPrompt;
  $("first-continue").onclick = startFromLastFrame;
  $("reset-settings").onclick = () => form.reset();
  $("server-chip").onclick = openServer;
  keepKeyboardOnWorld(keyStarts);
  addEventListener("beforeunload", (event) => {
    if (gallery.hasUnsaved || recording.isOn) event.preventDefault();
  });
  addEventListener("pagehide", () => player.isRunning && holdsServer && server.pageLeaves());
}

async function boot() {
  connectControls();
  await latencyPill.restore();
  await startForm.load();
  // The places are there although no server has answered yet.
  await Promise.all([server.start(), proposePreset("")]);
}

await boot();
