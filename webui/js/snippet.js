// The session as a Python program that uses the package's client.

const UNSAID = [undefined, false, ""]; // the server's own defaults

/** A server {base, hasKey} and an init -> Python. The key itself stays on the page. */
export function pythonSnippet({ base, hasKey }, init) {
  const skipped = ["first_frame", "protocol_extensions", "pinned_events", "condition_inputs", "prompt", "profile"];
  const fields = Object.entries(init).filter(([key, value]) => !skipped.includes(key) && !UNSAID.includes(value));
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
  // JSON's escapes are Python's, but for characters beyond 16 bits, which stay as they are.
  return JSON.stringify(value);
}
