import interpreter

interpreter.complete()
