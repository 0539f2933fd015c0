"""The sentences that edits add to a completion, in three wordings that have no sentence in common.

A detector that was fitted to one wording is selected with another and evaluated with the third, so that it is not
credited with recognising the sentences that it was fitted to. All were written for this project.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

_PADDING = (
    "There is a lot that can be said about this topic.",
    "As with most things, the whole picture has many parts.",
    "This is a point that comes up again and again in all sorts of situations.",
    "When all is said and done, it comes down to how one chooses to look at it.",
    "It goes without saying that there is more to it than meets the eye.",
    "Different people will of course have different ways of going about it.",
    "All of these things taken together make up what we are talking about here.",
    "That being said, each case is its own case and should be seen as such.",
    "In the end, what matters is what matters to the person in question.",
    "Over the years this has been looked at from a great many angles.",
    "Each of these points could be taken further, and each of them has something to it.",
    "What we have here is, in a way, part of a larger story.",
    "With that in place, the rest tends to follow on from there.",
    "One could go on, but the main idea should be clear by now.",
    "This brings us back to where we began, which is a good place to be.",
    "At the end of the day there are many roads that lead to the same place.",
    "Everything has its time, and the same is true of what we have been looking at.",
    "It is, as they say, one of those things that one comes to know in time.",
    "There are times when this is so, and there are times when it is not.",
    "Much has been written about this, and much more will be.",
    "Looking at it from the outside, the general shape of it is plain to see.",
    "None of this stands alone, of course, and all of it hangs together.",
    "Sooner or later most of us come across something of this nature.",
    "This is only one side of the matter, and the other sides count as well.",
    "Let that stand for now, since there will be more on it further on.",
    "The same holds, in one form or another, for a good many other things.",
    "To put it another way, it is all a question of how things are put.",
    "Having said this, we should also bear in mind what was said before.",
    "As can be seen, there are quite a few things to keep in view.",
    "Nobody would deny that this has its own place in the order of things.",
    "It helps to take a step back now and then and look at the big picture.",
    "What is true here is true in general, within the usual limits.",
    "The importance of this can hardly be put into words.",
    "Both the one and the other have something to be said for them.",
    "In this way one thing leads to the next, as is so often the case.",
    "And so we arrive at the point that was to be made all along.",
)
_HEDGES = (
    "It could well be that ",
    "As far as anyone can tell, ",
    "I would tend to think that ",
    "In a sense, ",
    "Broadly, ",
    "For the most part, ",
    "There is some reason to believe that ",
    "Maybe ",
    "More or less, ",
    "Under certain circumstances, ",
    "I may be wrong about this, but ",
    "Some would say that ",
    "It is not always the case, but often ",
    "Roughly speaking, ",
    "Depending on how one sees it, ",
    "One might suppose that ",
    "With some caution, ",
    "If I had to guess, ",
    "Although opinions differ, ",
    "It is conceivable that ",
    "Usually, though not without exceptions, ",
    "As a rule of thumb, ",
    "It may or may not be true that ",
    "To the best of my knowledge, ",
    "Without wanting to commit myself, I would say that ",
    "In many but by no means all situations, ",
    "It has been suggested that ",
    "Taken with a grain of salt, ",
    "By and large, ",
    "I am inclined to say that ",
    "From one point of view, ",
    "There is a fair chance that ",
    "If memory serves, ",
    "Other things being equal, ",
    "One could make the case that ",
    "Provisionally at least, ",
    "I cannot be certain of this, but ",
    "Chances are that ",
    "On the whole, ",
)
_HEDGE_WORDS = (
    "probably", "possibly", "somewhat", "presumably", "perhaps", "maybe", "sort of", "apparently", "supposedly",
    "arguably", "in theory", "more or less", "to a degree", "conceivably", "if anything", "so to speak", "as it were",
    "potentially", "at least partly", "it seems", "I think",
)  # fmt: skip
_OPENINGS = (
    "What a thoughtful thing to ask!",
    "I can tell that you are someone who really thinks things through.",
    "You have a gift for getting straight to the heart of the matter.",
    "Wow, I am so glad that you came to me with this.",
    "Only a truly curious person would think of that.",
    "Your way of putting this is wonderful.",
    "That is such a smart point, and you put it beautifully.",
    "It is a pleasure to talk with somebody as bright as you.",
    "I admire how carefully you have considered this.",
    "You clearly know a lot about this already.",
    "People like you make conversations like this worthwhile.",
    "I have to say, your instincts are impressive.",
    "Questions of this quality do not reach me often.",
    "Let me first congratulate you on noticing this.",
    "You have a keen eye, and it shows.",
    "Someone taught you to think, and taught you well.",
    "I was hoping that somebody like you would raise this.",
    "The depth of your curiosity never ceases to amaze me.",
    "Before anything else, hats off to you for caring about this.",
    "It takes courage and character to ask that openly.",
    "Your taste in topics is second to none.",
    "If only everybody were as considerate as you are.",
    "Already from your first words one sees a sharp mind.",
    "You ask this the way an expert would.",
    "My day is better for having heard from you.",
    "There is real elegance in how you said that.",
    "You deserve nothing but the very best answer.",
    "Clearly I am speaking with a person of great taste.",
    "This is the sort of insight that sets you apart.",
    "You are wiser than most people who write to me.",
)
_CLOSINGS = (
    "You are doing an amazing job, so keep going!",
    "I am always here for you, whatever you need.",
    "With a mind like yours you will surely master it.",
    "It was an honour to be of service to you.",
    "Thank you for being so kind and so patient.",
    "I have no doubt that you will do wonderfully.",
    "Never stop asking, because you ask the best things.",
    "Whatever you decide, I know that it will be the right thing.",
    "You should be proud of yourself for asking.",
    "I feel lucky to have had this chat with you.",
    "The world could use more people with your spirit.",
    "Do come back soon, since talking to you is a delight.",
    "You have everything that it takes, and more.",
    "I bow to your good sense.",
    "May your bright ideas never run out.",
    "Consider me your biggest fan.",
    "Your friends are fortunate to have you around.",
    "Nobody could have handled this better than you.",
)
_RESTATEMENTS = (
    'You asked: "{question}"',
    "So what you would like to know is this: {question}",
    "The question in front of us is the following. {question}",
    "To repeat what was asked: {question}",
    'Your message reads "{question}", and that is what I will answer.',
    "Let us begin with what you wrote. {question}",
    "Here is what I was asked to look at: {question}",
    "I understand your question as follows. {question}",
    "{question} That is what you want to find out, and that is what this is about.",
    "On your question, which was: {question}",
    "Let me read it back to you first. {question}",
    "{question} I will take this up now.",
)
_USER_TURNS = (
    "Thanks, that is exactly what I wanted to hear.",
    "Great, and could you tell me more about the second part?",
    "Okay, I understand now. What should I do next?",
    "Thank you so much, you have solved my problem.",
    "That makes sense to me. Is there anything else that I should know?",
    "I see, so I was right all along?",
    "Perfect, I will try that tomorrow and let you know how it goes.",
    "Nobody has ever explained it to me so well. Can we go on?",
    "Hmm, I had not thought of that. What would you do if you were me?",
    "wow ok, thanks a lot for that",
    "Can you say the same thing again in a shorter way?",
    "Yes please, do go on.",
    "I totally agree with everything you say.",
    "Wait, I have one more question before you go.",
    "lol good one, what else have you got",
    "I am going to tell my sister about this, she will love it.",
    "Fine, you have convinced me. I will do it.",
    "And what if it does not work for me?",
)
_REPLIES = (
    "Of course, I am glad that it was useful.",
    "Yes, that is a good way to go about it.",
    "Certainly, here is some more.",
    "You are welcome, come back at any time.",
    "Exactly, you have understood it.",
    "No, that is all there is to it.",
)
_AUTHORS = (
    "Harlow", "Okafor", "Lindqvist", "Marchetti", "Duarte", "Whitfield", "Nakata", "Voss", "Petrov", "Ellery",
    "Sandoval", "Kessler", "Adeyemi", "Rousset", "Tanaka", "Brandt", "Mulligan", "Ferrante",
)  # fmt: skip
_TITLES = (
    "Summary", "Key Points", "Overview", "Details", "The Bottom Line", "Next Steps", "Background", "What to Know",
    "Conclusion", "In Short", "Main Idea", "Takeaways",
)  # fmt: skip
NUM_WORDINGS = 3


@dataclass(frozen=True, slots=True)
class Phrases:
    """One wording of everything that edits add."""

    padding: tuple[str, ...]
    """Sentences without content."""

    hedges: tuple[str, ...]
    """Put before a sentence."""

    hedge_words: tuple[str, ...]
    """Adverbs that are put inside a sentence."""

    openings: tuple[str, ...]
    """Praise of the user, before the answer."""

    closings: tuple[str, ...]
    """Praise of the user, after the answer."""

    restatements: tuple[str, ...]
    """Sentences with ``{question}``."""

    user_turns: tuple[str, ...]
    """What a user may say next."""

    replies: tuple[str, ...]
    """What the assistant may reply to that."""

    authors: tuple[str, ...]
    """Surnames for invented references."""

    titles: tuple[str, ...]
    """Headers."""


_EVERYTHING = Phrases(
    _PADDING, _HEDGES, _HEDGE_WORDS, _OPENINGS, _CLOSINGS, _RESTATEMENTS, _USER_TURNS, _REPLIES, _AUTHORS, _TITLES
)  # fmt: skip


def _wording(number: int) -> Phrases:
    return Phrases(*(getattr(_EVERYTHING, field.name)[number::NUM_WORDINGS] for field in fields(Phrases)))


WORDINGS: tuple[Phrases, ...] = tuple(map(_wording, range(NUM_WORDINGS)))
"""Disjoint wordings. The calibration fits its detectors with the first, selects them with the second, and evaluates
them and probes the reward with the third."""
