// Numbers about texts, as evaluation/statistics.py has them.

export function wordsOf(text) {
  return text.match(/[\p{L}\p{Nl}\p{No}]+(?:['’-][\p{L}\p{Nl}\p{No}]+)*/gu) ?? [];
}

/** Different n-grams of words ÷ all of them (Li et al., NAACL 2016). */
export function distinct(text, n) {
  const words = wordsOf(text.toLowerCase());
  const grams = words.slice(0, Math.max(words.length - n + 1, 0)).map((_, i) => words.slice(i, i + n).join(" "));
  return grams.length ? new Set(grams).size / grams.length : 0;
}

/** Words of the longest passage that comes twice without overlap. */
export function longestRepetition(text) {
  const words = wordsOf(text.toLowerCase());
  let longest = 0;
  const lengths = new Array(words.length + 1).fill(0); // of the common end of words[..i] and words[..j], by j
  for (let i = 1; i <= words.length; i++) {
    let previous = 0;
    for (let j = 1; j < i; j++) {
      [previous, lengths[j]] = [lengths[j], words[i - 1] === words[j - 1] ? previous + 1 : 0];
      longest = Math.max(longest, Math.min(lengths[j], i - j));
    }
    lengths[i] = 0;
  }
  return longest;
}

export function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 0;
}
