// Text for the states and the ends of a session.

const ORDINAL_SUFFIXES = { one: "st", two: "nd", few: "rd", other: "th" };
const ordinalRule = new Intl.PluralRules("en", { type: "ordinal" });
const STATES = {
  connecting: "Connecting",
  opening: "Starting the session",
  warming: "Preparing this size",
  live: "Live",
  paused: "Paused",
  away: "Back in a moment",
  ended: "Ended",
  lost: "Interrupted",
};
const REPLAY_STATES = { live: "Replay", paused: "Replay, paused", ended: "The replay is over" };

/** `position` in line; 1 is next. */
export const placeText = (position) =>
  position === 1 ? "You are next" : `${position}${ORDINAL_SUFFIXES[ordinalRule.select(position)]} in line`;

/** `position` in line while the state is "waiting". `isReplay`: a saved session is replayed. */
export function stateText(state, position, isReplay = false) {
  if (state === "waiting") return placeText(position);
  return (isReplay && REPLAY_STATES[state]) || (STATES[state] ?? "");
}

/** Before the start, while somebody else's session runs. */
export function inUseText({ waiting, extensions }) {
  if (!extensions.includes("queue")) return "The server is in use.";
  const others = waiting ? ` ${waiting} ${waiting === 1 ? "visitor waits" : "visitors wait"} already.` : "";
  return `The server is in use.${others} You will wait in line.`;
}

const sizeText = (size) => size.replace("x", " × ");

/** Before the start, for a frame size that the server has no compiled code for yet. */
export const coldSizeText = ({ warmSizes }, size) =>
  warmSizes === null || warmSizes.includes(size)
    ? ""
    : `The server first prepares ${sizeText(size)}, once. That may take minutes.`;

/** While the server compiles. `expectedMs` is what that took for another size, or null. */
export function warmUpText({ size, expectedMs }) {
  const last = expectedMs === null ? "It may take minutes." : `The last size took ${Math.ceil(expectedMs / 1000)} s.`;
  return `The server prepares ${sizeText(size)}, once for all sessions of this size. ${last}`;
}

/** Before the start: what not to expect of the built-in model. */
export function builtinText({ id, defaultSize }, size) {
  if (id !== "lingbot-rt-builtin") return "";
  return size === defaultSize
    ? "The built-in model knows one small village. Any other picture turns into it. Some things lose their shape, and some do not appear."
    : `The built-in model knows its village at ${sizeText(defaultSize)} only: at other sizes it shows a blur.`;
}

/** Whether the end's close code says that the server, or the way to it, is gone. */
export const isServerAway = (code) => code === 1001 || code === 1006;

/**
 * An error card {title, detail, advice} for a session that ended without the user's wish. `isBlocked`: the WebSocket
 * never opened although the server answers. `wasKept`: the server had promised to keep the session.
 */
export function explainEnd({ code, message, errorCode, wasLive, isBlocked = false, wasKept = false }) {
  const card = (title, advice) => ({ title, detail: message, advice });
  if (isBlocked)
    return card(
      "The WebSocket is blocked",
      "The server answers over HTTP, but something between browser and server does not let its WebSocket through. " +
        "A proxy must pass the headers Upgrade and Connection.",
    );
  if (errorCode === "resumed_elsewhere")
    return { ...card("This world went on in another window", "It is open there. You can start a new one here."), minor: true };
  if (wasKept && errorCode === "invalid_init")
    return card("The server no longer has this world", "The last frame stays on screen. Your settings are kept.");
  if (errorCode === "session_busy" || /another realtime session/.test(message)) {
    const isFull = message.includes("--max-waiting");
    const title = isFull ? "The line is full" : "The server is in use";
    return { ...card(title, "It runs one session at a time. Try again in a while."), minor: true };
  }
  if (errorCode === "not_ready") return card("The server is still warming up", "Try again in a moment.");
  if (errorCode === "unauthorized" || /api.?key/i.test(message))
    return card("The server needs a key", "Open Server at the top of the page and enter the key. Then try again.");
  if (/^invalid generate request/.test(message))
    return card("The server refused these settings", "Change the setting that the message names. Then try again.");
  if (code === 1001)
    return card("The server was shut down", "Your settings are kept. Try again when the server is back.");
  if (code === 1011) return card("The session failed", "The server had an error. A new session usually works.");
  if (!wasLive) return card("No connection to the server", "Check the address under Server, and that the server runs.");
  return card("The connection was lost", "The last frame stays on screen. Your settings are kept.");
}
