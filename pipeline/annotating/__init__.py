"""Questions to people, and what comes back: who is asked what, the page and sheets they fill in, their answers read and
checked, and how far they agree.
"""
