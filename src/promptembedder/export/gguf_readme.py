def readme(compiled, precision, around):
    return "x\n"
