"""How ``auto`` chooses among backends, and kernels among their tile sizes.

:mod:`.auto` puts backends in order, by :mod:`.measured` tables or by :mod:`.estimates`; :mod:`.settings` carries what a table says
to a kernel; :mod:`.tuning` makes the tables. docs/tuning.md says it in the words of a user.
"""
