"""The ids after a vocabulary of V codes, numbered as in the released weights. csrc/block_mask.h repeats them for C++."""

SPECIAL_IDS = 5  # how many follow the codes
PAD_OFFSET = 1  # V + 1: a position without a video frame
MASK_OFFSET = 4  # V + 4: a position to predict
