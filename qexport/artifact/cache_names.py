"""What a decoder keeps from call to call, by the names of its inputs and outputs, as transformers.js has them.

Keys and values, keys of an indexer and what summaries of tokens are made of grow by a row for every token, [batch,
heads, tokens, features]: past_key_values.3.key becomes present.3.key, past_indexer.3 and past_summed.3 (of one head)
present_indexer.3 and present_summed.3. States of other layers keep their size: past_conv.0 becomes present_conv.0,
past_recurrent.0 present_recurrent.0; where a layer has several of a kind they are past_conv.0.0, past_conv.0.1 and so
on.
"""

TOKEN_IDS, EMBEDDINGS = "input_ids", "inputs_embeds"  # what a decoder reads: ids, or embeddings merged with features
KEYS, ROWS, STATES = "past_key_values.", ("past_indexer.", "past_summed."), ("past_conv.", "past_recurrent.")


def is_tokens(name: str) -> bool:
    """Whether an input of a decoder is what stands for its new tokens."""
    return name in (TOKEN_IDS, EMBEDDINGS)


def is_past(name: str) -> bool:
    """Whether an input takes what the call before made."""
    return name.startswith((KEYS, *ROWS, *STATES))


def is_state(name: str) -> bool:
    """Whether an input or output is of a size that does not depend on the length of the text."""
    return name.startswith(STATES) or past_of(name).startswith(STATES)


def present_of(past: str) -> str:
    """The output whose value an input takes in the next call."""
    return past.replace("past_key_values" if past.startswith(KEYS) else "past", "present", 1)


def past_of(present: str) -> str:
    """The input that takes an output in the next call; the name itself of an output that none takes."""
    if present.startswith("present."):
        return present.replace("present", "past_key_values", 1)
    return present.replace("present", "past", 1) if present.startswith("present_") else present


def is_present(name: str) -> bool:
    """Whether an output is taken by the next call."""
    return is_past(past_of(name)) and not is_past(name)
