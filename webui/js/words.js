// A session's states and ends in words for people.

const ENDINGS = { one: "st", two: "nd", few: "rd", other: "th" };
const ordinalRule = new Intl.PluralRules("en", { type: "ordinal" });

/** `place` in line, 1 is next. */
export function stateWords(state, place) {
  if (state === "waiting") return place === 1 ? "You are next" : `${place}${ENDINGS[ordinalRule.select(place)]} in line`;
  const words = { connecting: "Connecting", opening: "Building the world", live: "Live", paused: "Paused", ended: "Ended", lost: "Interrupted" };
  return words[state] ?? "";
}

/** Why a session ended against the player's will -> {title, words, advice}. */
export function explainEnd({ code, words, errorCode, wasLive }) {
  if (/another realtime session/.test(words))
    return { title: "Someone else is inside", words, advice: "This server shows one world at a time. Try again when it is free." };
  if (errorCode === "not_ready") return { title: "The server is still warming up", words, advice: "Try again in a moment." };
  if (errorCode === "unauthorized" || /api.?key/i.test(words))
    return { title: "The server asks for its key", words, advice: "Enter the key under Server, then try again." };
  if (/^invalid generate request/.test(words))
    return { title: "The server did not accept this beginning", words, advice: "Change what it names, then try again." };
  if (code === 1001) return { title: "The server was shut down", words, advice: "Your settings are kept. Try again when it is back." };
  if (code === 1011) return { title: "The world broke off", words, advice: "The server met an error. Beginning again usually helps." };
  if (!wasLive) return { title: "No connection to the server", words, advice: "Check the address under Server, and that the server runs." };
  return { title: "The connection was lost", words, advice: "The picture is the last one that arrived. Your settings are kept." };
}
