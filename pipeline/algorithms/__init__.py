"""The algorithm room: pure arithmetic. It opens no dataset, loads no model, draws no random number.

Letters in shapes:

    B   responses                T   response tokens, right-padded
    G   responses per prompt     K   ranked responses per prompt
    N   rankings

`mask` is True on response tokens; every other column is 0 where it is False. `group` holds one id per row: the rows
of a prompt's occurrence share it. Pieces stand on seven shelves (`shelf.py`), a recipe takes from them (`recipe.py`,
`recipes/`), and `bind.py` puts a recipe's pieces together. Only `losses.py`, `weights.py` and `bind.py` load torch.
"""
