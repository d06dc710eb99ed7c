"""Every word of the interface, in English and Chinese."""

LANGUAGES = {"English": "en", "中文": "zh"}

TEXTS = {
    "tagline": (
        "Ask about pictures. The whole conversation lives in one small state that never grows.",
        "看图问答。整段对话都存放在一个大小固定的小状态里。",
    ),
    "welcome": (
        "Show a picture and ask about it, or start with one of these.",
        "上传一张图片并提问，或从下面的例子开始。",
    ),
    "welcome_embedded": (
        "The built-in model is small: it knows drawn scenes of coloured shapes like these and nothing else. "
        "For photographs, start the demo with <code>--model</code>.",
        "内置模型很小，只认识下面这种由彩色图形组成的画面。如需询问照片，请用 <code>--model</code> 启动演示。",
    ),
    "ask": ("Ask, drop or paste pictures", "提问，可拖入或粘贴图片"),
    "chat": ("Conversation", "对话"),
    "camera": ("Camera", "拍照"),
    "new": ("New chat", "新对话"),
    "undo": ("Undo", "撤销"),
    "retry": ("Try again", "重新回答"),
    "edit": ("Edit last", "修改上一问"),
    "fork": ("Fork", "分叉"),
    "save": ("Save", "保存"),
    "load": ("Load", "载入"),
    "branch": ("Branch", "分支"),
    "reading": ("Model and reading", "模型与读图方式"),
    "model": ("Model", "模型"),
    "embedded": ("embedded (drawn scenes)", "内置模型（图形画面）"),
    "prompt": ("The picture stands", "图片的位置"),
    "prompt_sandwich": ("between two copies of the question", "夹在两遍问题之间"),
    "prompt_first": ("before the question", "问题之前"),
    "prompt_last": ("behind the question", "问题之后"),
    "scan": ("Layers read the patches", "各层读图的方向"),
    "scan_bi": ("forwards and backwards in turn", "正向、反向交替"),
    "scan_uni": ("forwards only", "只正向"),
    "scan_multi": ("in four directions in turn", "四个方向轮换"),
    "reading_note": (
        "A change starts a new conversation. Weights are trained for one way of reading; others may answer worse.",
        "更改后会开始新对话。权重按一种读法训练，换用其他读法时回答可能变差。",
    ),
    "sampling": ("How replies are written", "回答的生成方式"),
    "look_again": ("Read the last picture again behind each question", "每次提问后重看上一张图片"),
    "max_new_tokens": ("Longest reply, tokens", "回答的最大长度（token）"),
    "temperature": ("Temperature (0: always the likeliest word)", "温度（0：总取最可能的词）"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: off)", "Top-k（0：关闭）"),
    "seed": ("Seed (empty: random)", "随机种子（留空：随机）"),
    "presence_penalty": ("Presence penalty", "出现惩罚"),
    "frequency_penalty": ("Frequency penalty", "频率惩罚"),
    "penalty_decay": ("Penalty decay per token", "惩罚的衰减（每 token）"),
    "stop": ("Stop at these words, one a line", "遇到这些词时停止（每行一个）"),
    # side panel
    "summary": ("State {state} · KV cache of a transformer {cache}", "状态 {state} · Transformer 的 KV 缓存 {cache}"),
    "memory": ("Memory of this conversation", "本次对话的记忆"),
    "state": ("State of this model", "本模型的状态"),
    "cache": ("KV cache of a transformer of this size", "同规模 Transformer 的 KV 缓存"),
    "fixed": ("fixed", "固定"),
    "growing": ("+{size} a token", "每 token +{size}"),
    "nothing_read": (
        "Nothing read yet. The state will take {size}, however long the conversation gets.",
        "尚未读入内容。无论对话多长，状态都只占 {size}。",
    ),
    "smaller": ("{ratio}× smaller, and it never grows.", "只有缓存的 1/{ratio}，且不再增长。"),
    "larger": (
        "From token {tokens} on the state is the smaller one.",
        "从第 {tokens} 个 token 起，状态更小。",
    ),
    "tokens_read": ("tokens read", "已读 token"),
    "first_token": ("to the first token", "首个 token"),
    "speed": ("tokens a second", "token/秒"),
    "cut": ("The last reply was cut at its longest length.", "上一个回答达到最大长度，已截断。"),
    "turns": ("turns", "轮次"),
    # messages
    "note": ("Note", "提示"),
    "warning": ("That did not work", "未能完成"),
    "loading": ("Loading {model}. This can take a while.", "正在载入 {model}，可能需要一些时间。"),
    "waiting": ("Other replies are being written; yours comes next.", "其他回答正在生成，随后就轮到您。"),
    "bad_seed": (
        "Seed {given}: use a whole number from 0 to {limit}, or leave it empty.",
        "随机种子 {given} 无效：请填 0 到 {limit} 的整数，或留空。",
    ),
    "empty": ("Ask something first.", "请先输入问题。"),
    "busy": ("A reply is being written. Stop it first.", "回答正在生成，请先停止。"),
    "too_many_pictures": (
        "{given} pictures in one message; show at most {limit} at a time.",
        "一条消息里有 {given} 张图片；一次最多 {limit} 张。",
    ),
    "too_long": (
        "The message has {given} characters; the limit is {limit}.",
        "消息有 {given} 个字符，上限为 {limit}。",
    ),
    "too_many_stops": (
        "Stop at {limit} lines at most, of up to {characters} characters each.",
        "停止词最多 {limit} 行，每行最多 {characters} 个字符。",
    ),
    "ended": ("The reply that was being written ends here.", "正在生成的回答到此为止。"),
    "idle": (
        "Your conversation was closed after {minutes} idle minutes. Send again to start a new one.",
        "对话闲置 {minutes} 分钟，已关闭。再次发送即可开始新对话。",
    ),
    "crowded": (
        "Your conversation was closed to make room for others. Send again to start a new one.",
        "为给其他用户腾出空间，您的对话已关闭。再次发送即可开始新对话。",
    ),
    "left": (
        "The connection was lost and your conversation was closed. Send again to start a new one.",
        "连接中断，对话已关闭。再次发送即可开始新对话。",
    ),
    "restarted": ("New conversation.", "已开始新对话。"),
    "nothing": ("There is nothing yet: ask something first.", "还没有内容：请先提问。"),
    "no_undo": (
        "The turns before this point cannot be taken back.",
        "此前的轮次无法撤销。",
    ),
    "pictures_gone": (
        "The pictures of this turn are not at hand any more; attach them again.",
        "这一轮的图片已不在，请重新添加。",
    ),
    "picture_not_saved": ("[picture, not part of the saved file]", "［图片，未包含在保存文件中］"),
    "forks_full": ("{limit} branches are the most.", "最多 {limit} 个分支。"),
    "forked": ("Branch {name} goes on from here; switch back at any time.", "分支 {name} 从这里继续，可随时切换。"),
    "loaded": ("Conversation loaded: {turns} turns.", "已载入对话：{turns} 轮。"),
    # what the library says of it, which it says in English
    "bad_picture": (
        "{reason}",
        "图片无法使用。请换一张完好的图片，最好是 PNG 或 JPEG，且不要过大。详细原因：{reason}",
    ),
    "bad_message": ("{reason}", "这条消息无法回答。请修改内容或生成设置。详细原因：{reason}"),
    "bad_model": ("{reason}", "模型无法载入，请选择其他模型。详细原因：{reason}"),
    "bad_chat": (
        "{reason}",
        "无法载入对话。请选择用同一个模型保存的、完好的对话文件。详细原因：{reason}",
    ),
    "full": ("Files cannot be kept at present: {reason}", "目前无法保存文件：{reason}"),
    "draft": (
        "The box holds a message that was not sent. Send or clear it first.",
        "输入框里还有未发送的消息，请先发送或清空。",
    ),
    "bad_file": ("{file}: not a usable conversation file.", "{file}：不是可用的对话文件。"),
    "failed": ("The reply failed: {reason}", "回答失败：{reason}"),
    "refused": (
        "Only pictures can be shown, and saved conversations loaded.",
        "这里只能添加图片，或载入保存的对话。",
    ),
    "picture": ("Picture", "图片"),
}


def text(language: str, key: str, **values) -> str:
    """The text of a key in "en" or "zh", with its {values} filled in."""
    return TEXTS[key][language == "zh"].format(**values)


def language_of(accept_language: str | None) -> str:
    """ "zh" where the browser's Accept-Language header asks for Chinese first, otherwise "en"."""
    return "zh" if (accept_language or "").strip().lower().startswith("zh") else "en"
