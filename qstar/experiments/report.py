def write(name, found, folder):
    pass
