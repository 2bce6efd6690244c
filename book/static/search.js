// What a search finds in a chapter stands before the functions of the reference.
const first = page => (page.startsWith("notebooks/") ? 20 : page === "book/api" ? -20 : 0);
var Scorer = {
  score: ([page, , , , score]) => score + first(page),
  // the rest is what Sphinx has
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
