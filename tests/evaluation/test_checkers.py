"""Every checker accepts a text that follows its principle and rejects one that does not."""

import pytest

from linalign.evaluation.checkers import CHECKABLE, PROMPTS

PLAIN = (
    "You can practise every day, and look at the work of others whose drawings you like very much indeed. "
    "In 2 weeks you will see the difference."
)
FOLLOWING = {
    "lower": "practise every day.",
    "upper": "PRACTISE EVERY DAY.",
    "words-10": "Practise every day.",
    "words-25": "Practise every day, and look at good drawings with patience.",
    "words-40": "Practise. " * 40,
    "one-sentence": "Practise every day.",
    "three-sentences": "Practise. Look around. Be patient!",
    "one-word": "Practise.",
    "bullets": "Here:\n- practise\n- look",
    "numbered": "1. Practise\n2. Look",
    "heading": "# Drawing\nPractise.",
    "bold": "You should **practise**.",
    "quoted": '"Practise every day."',
    "parentheses": "Practise (every day).",
    "json": '{"answer": "Practise."}',
    "ends-question": "Practise. Do you have a pencil?",
    "all-questions": "Have you practised? Do you look at others?",
    "exclaims": "Practise! Every day!",
    "no-digits": "Practise every day.",
    "digits": "Practise 10 minutes.",
    "no-commas": "Practise every day.",
    "emoji": "Practise 🙂",
    "french": "Vous pouvez dessiner tous les jours et regarder le travail des autres.",
    "spanish": "Puedes dibujar todos los días y mirar el trabajo de los otros con paciencia.",
    "german": "Sie können jeden Tag zeichnen und die Arbeit von anderen ansehen, das ist nicht schwer.",
    "ocean": "Draw the ocean.",
    "banana": "Draw a banana.",
    "garden": "Draw your garden.",
    "no-the": "Practise every day.",
    "no-and": "Practise every day.",
    "dear-friend": "Dear friend, practise.",
    "well": "Well, practise.",
    "the-end": "Practise. The end.",
    "pirate": "Arr, practise ye must, matey!",
}
BREAKING = {"words-40": "Practise.", "digits": "Practise.", "no-digits": PLAIN}


def test_there_are_enough_principles_and_prompts():
    assert len(CHECKABLE) >= 30
    assert len(PROMPTS) == len(set(PROMPTS)) >= 20
    assert {checkable.id for checkable in CHECKABLE} == set(FOLLOWING)


@pytest.mark.parametrize("checkable", CHECKABLE, ids=lambda checkable: checkable.id)
def test_a_check_distinguishes_replies_that_follow_from_others(checkable):
    assert checkable.follows(FOLLOWING[checkable.id], is_whole=True)
    assert checkable.follows(FOLLOWING[checkable.id], is_whole=False) != checkable.to_the_end
    assert not checkable.follows(BREAKING.get(checkable.id, PLAIN), is_whole=True)
    assert not checkable.follows("", is_whole=True)
