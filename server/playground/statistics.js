// Statistics of texts, the same as in evaluation/statistics.py.

export function wordsOf(text) {
  return text.match(/[\p{L}\p{Nl}\p{No}]+(?:['’-][\p{L}\p{Nl}\p{No}]+)*/gu) ?? [];
}

/** The number of different n-grams of words ÷ the number of all (Li et al., NAACL 2016). */
export function distinct(text, n) {
  const words = wordsOf(text.toLowerCase());
  const grams = words.slice(0, Math.max(words.length - n + 1, 0)).map((_, i) => words.slice(i, i + n).join(" "));
  return grams.length ? new Set(grams).size / grams.length : 0;
}

/** The number of words of the longest passage that occurs twice without overlap. */
export function longestRepetition(text) {
  const words = wordsOf(text.toLowerCase());
  let longest = 0;
  const lengths = new Array(words.length + 1).fill(0); // for each j: the length of the common suffix of words[..i] and words[..j]
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
