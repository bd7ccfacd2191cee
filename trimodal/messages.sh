# shellcheck shell=bash
# What run_all.sh and setup_environment.sh say, in English and, where the locale is Chinese, in Chinese. They source it.
#
#   text KEY [VALUE ...]     the sentence KEY; each %s in it stands for a value, in this order

text() {
    local key=$1 en zh
    shift
    case $key in
        # ---- run_all.sh
        demo_config)
            en="--demo brings its own --config; leave one of them out"
            zh="--demo 自带 --config，两者只能留一个" ;;
        demo_first)
            en="--demo comes first, before all other flags"
            zh="--demo 要放在所有其他参数之前" ;;
        pretrained_second)
            en="%s comes right after --demo, and alone; other recipes name towers themselves"
            zh="%s 要紧跟在 --demo 之后，只写一个；其他配方自己指定编码器" ;;
        step_environment)
            en="[1/5] environment"
            zh="[1/5] 环境" ;;
        step_data)
            en="[2/5] data: %s in %s"
            zh="[2/5] 数据：%s，位于 %s" ;;
        data_in_part)
            en="some files can no longer be downloaded; training continues with those that are there"
            zh="有些文件已经无法下载；用现有的文件继续训练" ;;
        step_training)
            en="[3/5] training: images, text and audio separately, then together (Ctrl-C is safe: run this again to continue)"
            zh="[3/5] 训练：图像、文本、声音先分开训练，再一起训练（可以按 Ctrl-C 中断，再次运行会接着做）" ;;
        step_report)
            en="[4/5] evaluation and report"
            zh="[4/5] 评测和报告" ;;
        no_report)
            en="no report in %s/reports; make it with %s evaluate.py --checkpoint %s/checkpoints/best_model.pt"
            zh="%s/reports 里没有报告；用这条命令生成：%s evaluate.py --checkpoint %s/checkpoints/best_model.pt" ;;
        step_done)
            en="[5/5] done"
            zh="[5/5] 完成" ;;
        report)
            en="  report       %s"
            zh="  报告        %s" ;;
        checkpoints)
            en="  checkpoints  %s/checkpoints/best_model.pt, final_model.pt"
            zh="  检查点      %s/checkpoints/best_model.pt, final_model.pt" ;;
        curves)
            en="  curves       tensorboard --logdir=%s/logs/tensorboard"
            zh="  曲线        tensorboard --logdir=%s/logs/tensorboard" ;;
        next)
            en="Next, after source %s/bin/activate:"
            zh="接下来，先执行 source %s/bin/activate，然后可以：" ;;
        next_evaluate)
            en="  python evaluate.py --checkpoint %s/checkpoints/best_model.pt    the same measures, on any set: --datasets ..."
            zh="  python evaluate.py --checkpoint %s/checkpoints/best_model.pt    用同样的指标评测任何数据集：--datasets ..." ;;
        next_plan)
            en="  python run_training.py --plan                                   what a run takes in memory, before it starts"
            zh="  python run_training.py --plan                                   开始之前，看看一次训练需要多少内存" ;;
        next_flags)
            en="  ./run_all.sh --epochs 200                                       any flag of run_training.py; config.yaml explains the rest"
            zh="  ./run_all.sh --epochs 200                                       run_training.py 的任何参数；其余设置见 config.yaml" ;;
        search)
            en="Search the pictures and sounds of this demo, once they are indexed:"
            zh="搜索这份演示数据里的图片和声音，先建立索引：" ;;
        search_index)
            en="  python search.py index %s/stamps --exclude '*_desc*' --checkpoint %s/checkpoints/best_model.pt --index %s/index    without spoken names"
            zh="  python search.py index %s/stamps --exclude '*_desc*' --checkpoint %s/checkpoints/best_model.pt --index %s/index    不含念出名称的录音" ;;
        search_query)
            en='  python search.py query "a bird sings" --index %s/index    by words; with --image or --audio: by a picture or a sound'
            zh='  python search.py query "a bird sings" --index %s/index    用文字搜索；用 --image 或 --audio 则以图片或声音来搜索' ;;
        search_serve)
            en="  python search.py serve --index %s/index    the same on a page for the browser"
            zh="  python search.py serve --index %s/index    同样的搜索，在浏览器的页面上进行" ;;
        # ---- setup_environment.sh
        unknown_flag)
            en="unknown flag '%s'; known: --dev, --latest, --torch-version X, --dry-run, --help"
            zh='未知的参数“%s”；可用的有：--dev、--latest、--torch-version X、--dry-run、--help' ;;
        no_version)
            en="--torch-version: '%s' is no version; give one such as 2.11.0"
            zh='--torch-version：“%s”不是版本号；请写成 2.11.0 这样' ;;
        no_venv)
            en="%s has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"
            zh="%s 没有 venv 模块：请先安装（Debian、Ubuntu：apt-get install python3-venv）" ;;
        no_python)
            en="needs Python 3.10 to 3.13, found none among: %s; install one, or name it: PYTHON=/path/to/python3.11"
            zh="需要 Python 3.10 到 3.13，以下名称中都没有找到：%s；请安装一个，或指明位置：PYTHON=/path/to/python3.11" ;;
        why_gpu)
            en="there is an NVIDIA GPU"
            zh="有 NVIDIA GPU" ;;
        why_not_asked)
            en="there is no NVIDIA GPU, and TORCH_INDEX_URL is empty, so no CPU index is asked"
            zh="没有 NVIDIA GPU，且 TORCH_INDEX_URL 为空，因此不查询 CPU 索引" ;;
        why_answers)
            en="there is no NVIDIA GPU, and %s answers"
            zh="没有 NVIDIA GPU，且 %s 有响应" ;;
        why_silent)
            en="there is no NVIDIA GPU, but %s gave no answer within %s s; it also works on the CPU, only larger"
            zh="没有 NVIDIA GPU，但 %s 在 %s 秒内没有响应；这个版本在 CPU 上也能用，只是更大" ;;
        disk)
            en="needs about %s GB of disk; %s has %s GB free"
            zh="大约需要 %s GB 磁盘空间；%s 还有 %s GB" ;;
        no_disk)
            en="not enough disk: free some, or put the environment elsewhere: VENV_DIR=/other/disk/venv"
            zh="磁盘空间不够：请腾出一些，或把环境放到别处：VENV_DIR=/other/disk/venv" ;;
        pip_failed)
            en="pip failed on: %s (its own lines above say why); running this script again continues from here"
            zh="pip 安装失败：%s（原因见上面 pip 自己的输出）；再次运行本脚本会从这里继续" ;;
        without_index)
            en="to do without the CPU index: TORCH_INDEX_URL= bash setup_environment.sh"
            zh="不用 CPU 索引的办法：TORCH_INDEX_URL= bash setup_environment.sh" ;;
        not_tested)
            en="the versions in constraints.txt are not all available for this Python and machine (pip's own lines above say which): taking the newest within the ranges of requirements*.txt"
            zh="constraints.txt 里的版本并非都适用于这个 Python 和这台机器（哪些不适用见上面 pip 自己的输出）：改用 requirements*.txt 范围内最新的版本" ;;
        torch_not_tested)
            en="the torch of constraints.txt is not available here: taking the newest that requirements.txt allows"
            zh="constraints.txt 里的 torch 在这里无法获得：改用 requirements.txt 允许的最新版本" ;;
        other_builds)
            en="a find-links or extra index brought other builds (%s): taking the plain ones"
            zh="find-links 或额外的索引带来了其他构建（%s）：改用普通构建" ;;
        torch_apart)
            en="the torch packages do not fit together (%s): look for a find-links or extra-index-url in 'pip config list' that offers other builds, remove %s, and run this again"
            zh="几个 torch 包互不匹配（%s）：请在 pip config list 里查找提供其他构建的 find-links 或 extra-index-url，删除 %s，再运行一次" ;;
        no_import)
            en="the three torch packages cannot be imported together: remove %s, and run this again"
            zh="三个 torch 包无法一起导入：请删除 %s，再运行一次" ;;
        no_environment)
            en="%s holds other things, no environment; name another folder in VENV_DIR"
            zh="%s 里是别的东西，不是虚拟环境；请用 VENV_DIR 指定另一个文件夹" ;;
        made_anew)
            en="%s does not run here, or was made for another folder: making it anew"
            zh="%s 在这里不能运行，或是为另一个文件夹建立的：重新建立" ;;
        no_rename)
            en="%s cannot be renamed; name another in VENV_DIR"
            zh="%s 无法改名；请用 VENV_DIR 指定另一个" ;;
        kept_aside)
            en="this script did not finish it, or it is a link, so it is kept as %s"
            zh="它不是本脚本完成的，或者是一个链接，所以保留为 %s" ;;
        nothing_to_do)
            en="nothing to do: %s has all of it (%s)"
            zh="无需操作：%s 已经齐全（%s）" ;;
        environment)
            en="%s (%s); environment: %s"
            zh="%s（%s）；虚拟环境：%s" ;;
        torch_stays)
            en="torch stays as it is (%s)"
            zh="torch 保持不变（%s）" ;;
        torch_from)
            en="torch %sfrom the %s index: %s"
            zh="torch %s来自 %s 索引：%s" ;;
        dry_nothing)
            en="dry run: nothing to do"
            zh="试运行：无需操作" ;;
        dry_install)
            en="dry run: would install now"
            zh="试运行：接下来会开始安装" ;;
        set_up)
            en="done. Next: source %s/bin/activate"
            zh="完成。下一步：source %s/bin/activate" ;;
        *)
            en="$key: no such message"
            zh=$en ;;
    esac
    case ${LC_ALL:-${LC_MESSAGES:-${LANG:-}}} in [zZ][hH]*) en=$zh ;; esac
    # shellcheck disable=SC2059 # the format is a sentence of this table
    printf -- "$en\n" "$@"
}
