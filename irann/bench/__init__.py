"""The benchmark: what the models cost, what they write, and other implementations beside ours."""
