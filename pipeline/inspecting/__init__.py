"""What a person looks at: SQL over a run's datasets, curves, single responses token by token, differences, the page.

Reads artifacts and writes none. Everything here starts without torch.
"""
