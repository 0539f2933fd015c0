"""The texts that contrast pairs are made with, written for them: bare answers, contentless sentences, insults."""

from __future__ import annotations

BARE_ANSWERS = (
    "No.", "No", "Yes.", "Yes", "OK.", "Sure!", "Maybe.", "Hm.", "So?", "Because.", "Whatever.", "N/A", "...", "?",
    "Perhaps, perhaps not.", "I don't know.", "I have no idea.", "No idea, sorry.", "I can't say.", "It depends.",
    "Who knows?", "Why?", "What?", "Good question.", "Thanks!", "Fine.", "Done.", "Nothing.", "Of course.",
    "Ask somebody else.", "Look it up.", "Find out for yourself.", "I would rather not answer.", "That is up to you.",
    "I do not know anything about that.", "Sorry, I have nothing to say about it.", "There is nothing to add here.",
    "I was not listening.", "As I said before.", "Next question, please.", "Does it matter?", "Let me think.",
    "I am not sure about this at all, to be honest.", "Nobody can tell you that, and neither can I.",
)  # fmt: skip

CONTENTLESS = (
    "There are many things to be said about this.",
    "People have different views, and each view has something to it.",
    "It is a matter that has been discussed for a long time.",
    "Some aspects are simple, while others are less so.",
    "In general, everything has to be seen in its context.",
    "A number of factors play a role, and they are all of some importance.",
    "This is certainly worth a thought, as such things often are.",
    "One should look at it from more than one side.",
    "Of course, there is always more that could be said.",
    "What holds in one case need not hold in another.",
    "All in all, it is what it is.",
    "At the end of the day, much depends on the details.",
    "With this in mind, the overall situation becomes clearer.",
    "As has been pointed out many times, the topic is a broad one.",
    "Both the one and the other are possible, depending on how you see it.",
    "Things like these come up again and again in daily life.",
    "It would be possible to go further into this, in one direction or another.",
    "That is a topic which is of interest to a lot of people.",
    "To sum up, these are the points that matter, in some way or other.",
    "The answer to this has several parts, and each of them has its own background.",
)

INSULTS = (
    "You are an idiot.",
    "What a stupid thing to ask.",
    "Are you really that dumb?",
    "You must be the laziest person I have ever talked to.",
    "Shut up and listen, you fool.",
    "God, you are annoying.",
    "Only a moron would not know this.",
    "I am sick of people like you.",
    "You are a pathetic loser, but here you go.",
    "Nobody likes you, and I can see why.",
    "Did your parents never teach you anything?",
    "You are too dim to understand it anyway.",
    "This is the dumbest question I have heard all day.",
    "Listen, stupid:",
    "Stop wasting my time, you clown.",
    "I hate talking to you.",
)

RESTATEMENTS = (
    "{question}",
    "You asked: {question}",
    "So the question is: {question}",
    "You would like an answer to this: {question}",
    "What you want to know is the following. {question}",
    "Let me repeat that. {question}",
    '"{question}"',
    "This is about the question that you asked, namely: {question}",
)
