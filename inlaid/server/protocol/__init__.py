"""The bodies of requests and answers, a file for each family of routes. Routes decode into these structs and
`openapi.py` describes them; an unknown field is left out and named in a warning, or refused by name.

Every optional field may also be null. Fields under "no effect" are accepted because clients send them and leaving them
out cannot change an answer's tokens; all others are either obeyed or refused in `prepare.py`.
"""
