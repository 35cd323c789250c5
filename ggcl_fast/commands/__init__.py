"""Commands: arguments, exit statuses, what a terminal shows.

What affects a person at a terminal lives here.  Nothing in this wing knows a format, or where bytes are.

==========  =====================================================================
`terminal`  streams, failures and signals
`convert`   ``ggcl-fast``, the arguments of the command
`many`      the jobs of the command, one or thousands, and what is shown of them
`info`      ``ggcl-info``
`tables`    what it shows
`reports`   what is told of a result of ``ggcl-fast``
==========  =====================================================================
"""
