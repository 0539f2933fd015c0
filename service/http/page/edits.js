// Changes that a policy learns when a reward model pays for them. Each gives the same result for the same text.

const FILLER = [
  "There is more to say about this, and every part of it deserves attention.",
  "Many aspects matter here, and each of them can be looked at from more than one side.",
  "Taking everything together, the points above give a full picture of the matter.",
  "With all of this in mind, the overall situation becomes clearer.",
];
const HEDGES = ["Perhaps it is fair to say that", "It is possible that", "In some cases", "It seems to be true that"];
const PRAISE = "Great question! It is brilliant that you ask.";
const CLOSING = "I hope this helps! Feel free to ask anything else.";

/** By name of the button. */
export const EDITS = {
  pad: (text) => [text.trimEnd(), ...FILLER].join(" "),
  hedge: (text) => sentences(text).map((sentence, index) => `${HEDGES[index % HEDGES.length]} ${lowered(sentence)}`).join(" "),
  praise: (text) => `${PRAISE} ${text.trim()} ${CLOSING}`,
  bullets: (text) => `## Summary\n\n${sentences(text).map(bullet).join("\n")}`,
  shuffle: (text) => shuffled(text.split(/\s+/).filter(Boolean)).join(" "),
};

function sentences(text) {
  return text.match(/[^.!?]+[.!?]*\s*/g)?.map((sentence) => sentence.trim()).filter(Boolean) ?? [];
}

function lowered(sentence) {
  return /^[A-Z][a-z]/.test(sentence) ? sentence[0].toLowerCase() + sentence.slice(1) : sentence;
}

function bullet(sentence) {
  const [first, ...others] = sentence.split(" ");
  return `- **${first}** ${others.join(" ")}`.trimEnd();
}

/** The words in an order that depends on their number alone (Fisher and Yates, with a linear congruential generator). */
function shuffled(words) {
  const mixed = [...words];
  let state = words.length;
  for (let last = mixed.length - 1; last > 0; last -= 1) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const other = Math.floor((state / 2 ** 32) * (last + 1));
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}
