// JSON with seeds. They go up to 2^64 - 1, and a JavaScript number holds only 53 bits: so here a seed is text, of digits.

const MAX_SEED = 2n ** 64n - 1n;

/** Return whether text is a seed: digits for a number up to 2^64 - 1. */
export function isSeed(text) {
  return /^[0-9]{1,20}$/.test(text) && BigInt(text) <= MAX_SEED;
}

/** Return the JSON text of a request; a `seed` is digits, and is written as the number that they are. */
export function requestText(fields) {
  const { seed, ...others } = fields;
  const text = JSON.stringify(others);
  if (seed === undefined || seed === null) return text;
  if (!isSeed(seed)) throw new RangeError("a seed is a number from 0 to 2^64 - 1");
  return `${text.slice(0, -1)}${text === "{}" ? "" : ","}"seed":${BigInt(seed)}}`;
}

/**
 * Return the value of an answer's JSON text, with every seed as digits. In JSON a quotation mark inside a string has a
 * backslash before it, so `"seed":` can only be a key.
 */
export function parseAnswer(text) {
  return JSON.parse(text.replace(/"seed":\s*([0-9]+)/g, '"seed":"$1"'));
}

/** Return a command for a shell that sends a request, and shows or keeps the answer. */
export function curlCommand(path, fields, withKey) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = [
    `curl -s ${quoted(new URL(path, document.baseURI).href)}`,
    "-H 'Content-Type: application/json'",
    ...(withKey ? ['-H "Authorization: Bearer $API_KEY"'] : []), // the key itself does not leave the page
    `-d ${quoted(requestText(fields))}`,
  ];
  return parts.join(" \\\n  ");
}
