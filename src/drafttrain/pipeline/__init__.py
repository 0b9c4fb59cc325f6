"""The stages of a run, gen -> train -> export -> eval: the one room that sees a whole recipe and gives each room its section."""
