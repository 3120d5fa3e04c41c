// The session as a Python program for the package's client.

const DEFAULTS = [undefined, false, ""]; // values that the server assumes

/** A server {base, hasKey} and an init -> Python source. The key itself is never written. */
export function pythonSnippet({ base, hasKey }, init) {
  const skipped = ["first_frame", "protocol_extensions", "pinned_events", "condition_inputs", "prompt", "profile"];
  const fields = Object.entries(init).filter(([key, value]) => !skipped.includes(key) && !DEFAULTS.includes(value));
  return [
    "from lingbot_rt.client import connect",
    "",
    "with connect(",
    `    ${literal(base)},`,
    `    prompt=${literal(init.prompt)},`,
    `    first_frame="first_frame.png",`,
    ...(hasKey ? [`    api_key="the server's key",`] : []),
    ...fields.map(([key, value]) => `    ${key}=${literal(value)},`),
    ") as world:",
    `    world.press("w")`,
    "    for frame in world:",
    "        print(frame.pixels.shape)  # uint8 [height, width, 3]",
    "",
  ].join("\n");
}

function literal(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  // Every escape that JSON.stringify writes means the same in Python.
  return JSON.stringify(value);
}
