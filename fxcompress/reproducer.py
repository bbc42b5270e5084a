def leave(model, plan, call, place):
    return ""
