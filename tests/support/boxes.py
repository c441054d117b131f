"""What a command line prints, as one line without the boxes that it is printed in."""

import re


def unboxed(text: str) -> str:
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
