from spaperb.validation import listed


def test_long_lists_are_cut():
    assert listed([]) == "none"
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(100)).endswith("18, 19, ... (100 in all)")
